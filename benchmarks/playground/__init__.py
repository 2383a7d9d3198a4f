"""A verifier, its speculators and prompts that need no download.

Everything under ``checkpoints/`` is made by ``python -m benchmarks.playground`` from the source
text of the Python standard library and nothing else.
"""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
VERIFIER = CHECKPOINTS / "verifier"
EAGLE3 = CHECKPOINTS / "eagle3"
SPECULATORS = {name: CHECKPOINTS / name for name in ("eagle3", "peagle", "dflash", "mtp")}
PROMPTS = CHECKPOINTS / "prompts.jsonl"
