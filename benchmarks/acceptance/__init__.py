"""How much of what speculators propose is kept, and what that gains."""
