"""``python -m benchmarks.playground``: rebuilds verifier, speculators and prompts from nothing."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import cyclopts

from benchmarks import playground
from benchmarks.playground import corpus, speculators, tokenizer, verifier
from benchmarks.report import environment

Part = Literal["verifier", "prompts", "eagle3"]
PARTS: tuple[Part, ...] = ("verifier", "prompts", "eagle3")
NUM_EVAL_ROWS = 64


def rebuild(*, output: Path = playground.CHECKPOINTS, only: Part | None = None) -> None:
    """Trains the playground on this machine's standard library.

    Parameters
    ----------
    output:
        Folder to write into.
    only:
        One part; the verifier must be there already for the others.
    """
    files = corpus.read_library()
    train = [file for file in files if not file.is_held_out]
    held_out = [file for file in files if file.is_held_out]
    verifier_folder = output / playground.VERIFIER.name
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)

        def build_verifier() -> list[dict[str, Any]]:
            words = tokenizer.train_tokenizer((file.text for file in train), verifier_folder)
            return verifier.train_verifier(train, held_out, words, verifier_folder, work)

        def build_eagle3() -> list[dict[str, Any]]:
            words = tokenizer.load_tokenizer(verifier_folder)
            train_rows = verifier.rows(verifier.documents(train, words))
            eval_rows = verifier.rows(verifier.documents(held_out, words))
            return speculators.train_eagle3(
                train_rows,
                eval_rows.select(range(NUM_EVAL_ROWS)),
                verifier_folder,
                output / playground.EAGLE3.name,
                work,
            )

        if only in (None, "verifier"):
            _build(verifier_folder, build_verifier)
        if only in (None, "prompts"):
            corpus.write_prompts(corpus.prompts(files), output / playground.PROMPTS.name)
        if only in (None, "eagle3"):
            _build(output / playground.EAGLE3.name, build_eagle3)


def _build(folder: Path, train: Callable[[], list[dict[str, Any]]]) -> None:
    """Trains, and writes how it went beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    history = train()
    log = {
        "command": "python -m benchmarks.playground",
        "environment": environment(),
        "seconds": round(time.monotonic() - start),
        "history": history,
    }
    (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    cyclopts.run(rebuild)
