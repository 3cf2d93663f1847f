"""An HTTP server over one backend: fill-mask, scoring, the raw graph, and a page to play with."""
