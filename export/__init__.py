"""Checkpoint → artifact: an ONNX engine with its tokenizer, and the proof that it computes what the checkpoint does."""
