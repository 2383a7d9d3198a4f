"""Networks for vLLM's model registry."""
