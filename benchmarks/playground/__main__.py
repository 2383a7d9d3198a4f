"""``python -m benchmarks.playground``: rebuilds verifier, speculators and prompts from nothing."""

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from benchmarks import playground
from benchmarks.playground import corpus, speculators, tokenizer, verifier
from speculators_core.cli import run_function
from speculators_core.errors import SpeculatorError
from speculators_core.model import load_verifier
from speculators_core.provenance import environment

Part = Literal["verifier", "prompts", "eagle3", "peagle", "dflash", "mtp"]
NUM_EVAL_ROWS = 16


def rebuild(*, output: Path = playground.CHECKPOINTS, only: Part | None = None) -> None:
    """Trains the playground on this machine's standard library.

    Parameters
    ----------
    output:
        Folder to write into.
    only:
        One part; the verifier must be there already for a speculator.
    """
    files = corpus.read_library()
    train = [file for file in files if not file.is_held_out]
    held_out = [file for file in files if file.is_held_out]
    verifier_folder = output / playground.VERIFIER.name
    if only in speculators.PLANS and not (verifier_folder / "config.json").exists():
        raise SpeculatorError(
            f"{verifier_folder}: no verifier there, which --only {only} needs. Build it first with "
            "--only verifier."
        )
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)

        def build_verifier() -> list[dict[str, Any]]:
            words = tokenizer.train_tokenizer((file.text for file in train), verifier_folder)
            return verifier.train_verifier(train, held_out, words, verifier_folder, work)

        @cache
        def data() -> tuple[Dataset, Dataset, Dataset]:
            words = tokenizer.load_tokenizer(verifier_folder)
            train_rows = verifier.rows(verifier.documents(train, words))
            eval_rows = verifier.rows(verifier.documents(held_out, words))
            model = load_verifier(str(verifier_folder), torch.float32)
            answers = speculators.greedy_answers(model, train_rows)
            return train_rows, eval_rows.select(range(NUM_EVAL_ROWS)), answers

        def build_speculator(name: str) -> list[dict[str, Any]]:
            return speculators.train_speculator(
                name, *data(), verifier_folder, output / name, work / name
            )

        if only in (None, "verifier"):
            _build(verifier_folder, build_verifier)
        if only in (None, "prompts"):
            corpus.write_prompts(corpus.prompts(files), output / playground.PROMPTS.name)
        for name in speculators.PLANS:
            if only in (None, name):
                _build(output / name, partial(build_speculator, name))


def _build(folder: Path, train: Callable[[], list[dict[str, Any]]]) -> None:
    """Trains, and writes how it went beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    history = train()
    log = {
        "command": shlex.join(["python", "-m", "benchmarks.playground", *sys.argv[1:]]),
        "environment": environment(),
        "seconds": round(time.monotonic() - start),
        "history": history,
    }
    (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    run_function(rebuild)
