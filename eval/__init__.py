"""Evaluation of masked language models: deterministic masks, exact pseudo-likelihood, intervals, stored evidence."""
