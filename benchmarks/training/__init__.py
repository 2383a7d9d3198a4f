"""How drafts train: single steps, and whole runs beside others."""

from pathlib import Path

PEERS = Path(__file__).parent / "peers"
"""A verifier, speculators that another implementation trained for it, and what vLLM accepted."""
