"""Training: a TOML configuration in, a run folder with Hugging Face checkpoints out."""
