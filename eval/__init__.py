"""Measuring masked language models: deterministic masks, exact pseudo-likelihood, intervals, evidence a token."""
