"""Engines: examples in, hidden states out."""
