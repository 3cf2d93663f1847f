"""mlmkit: masked language models from text to checkpoint, engine, measurement and use."""

__version__ = "0.1.0"
