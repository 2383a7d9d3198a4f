"""The reference decoder: draft, verify, accept."""
