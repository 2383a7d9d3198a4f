"""Speculators for speculative decoding: configs, draft models, training and a reference decoder."""
