"""Conversations with the verifier's own answers."""
