"""Serves speculators in vLLM, as a plug-in."""
