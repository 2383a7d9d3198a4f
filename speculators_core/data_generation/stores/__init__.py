"""Examples on disk."""
