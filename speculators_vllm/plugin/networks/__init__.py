"""Networks for vLLM's model registry; imported by the processes that run them."""
