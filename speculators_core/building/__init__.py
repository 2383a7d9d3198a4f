"""From verifier and prompts to a measured speculator."""
