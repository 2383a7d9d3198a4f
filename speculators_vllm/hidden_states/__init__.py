"""Hidden states out of vLLM: a KV connector that hands them to files or over ZeroMQ."""
