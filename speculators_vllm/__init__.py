"""Serves speculators in vLLM; loaded by vLLM itself through its entry points."""
