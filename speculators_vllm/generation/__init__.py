"""Data generation and answers on vLLM."""
