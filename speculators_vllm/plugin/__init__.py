"""Changes to vLLM: registries, configs, proposers and networks."""
