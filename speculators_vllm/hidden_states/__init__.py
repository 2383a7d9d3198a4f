"""Hidden states out of vLLM: a KV connector that hands them to files or over ZeroMQ."""

CONNECTOR_MODULE = "speculators_vllm.hidden_states.connector"
"""By which vLLM finds the connector."""
