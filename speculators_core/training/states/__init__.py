"""Saved states of a run, and its folder."""
