"""Training: TOML in, a run folder with Hugging Face checkpoints out."""
