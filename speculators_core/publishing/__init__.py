"""Model cards, and the way to the hub."""
