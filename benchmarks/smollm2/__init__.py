"""A real verifier without a model hub: SmolLM2-135M-Instruct, and prompts to measure it on.

Its weights come from a package of the Python registry (Apache-2.0), and 24 of the prompts from
another (HumanEval, MIT). The chats are the project's own writing.
"""

from pathlib import Path

CHATS = Path(__file__).parent / "chats.jsonl"
"""Prompts of six kinds, eight of each."""
