"""What changes in vLLM: its registries, configs, proposers and networks."""
