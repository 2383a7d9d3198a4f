"""What is read of a verifier, and what must agree with it."""
