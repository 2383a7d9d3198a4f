"""``python -m benchmarks.playground``: rebuilds the playground."""

import json
import shlex
import tempfile
import time
from pathlib import Path
from typing import Literal

from benchmarks import playground
from benchmarks.playground import corpus, speculators, tokenizer, verifier
from speculators_core.cli import run_function
from speculators_core.errors import SpeculatorError
from speculators_core.provenance import environment, this_command

Part = Literal["verifier", "prompts", "eagle3", "peagle", "dflash", "mtp"]


def rebuild(
    *,
    output: Path = playground.CHECKPOINTS,
    only: Part | None = None,
    work: Path = Path("results/playground"),
) -> None:
    """Trains the playground on this machine's standard library.

    Parameters
    ----------
    output:
        Folder to write into.
    only:
        One part to build; a speculator needs the verifier in the output folder.
    work:
        Folder for data (some 3 GB) and runs of the speculators; those in it are resumed.
    """
    files = corpus.read_library()
    train = [file for file in files if not file.is_held_out]
    held_out = [file for file in files if file.is_held_out]
    verifier_folder = output / playground.VERIFIER.name
    if only in playground.SPECULATORS and not (verifier_folder / "config.json").exists():
        raise SpeculatorError(
            f"{verifier_folder}: no verifier there, which --only {only} needs. Build it first with "
            "--only verifier."
        )
    if only in (None, "verifier"):
        _build_verifier(train, held_out, verifier_folder)
    if only in (None, "prompts"):
        corpus.write_lines(corpus.prompts(files), output / playground.PROMPTS.name)
    chosen = [name for name in playground.SPECULATORS if only in (None, name)]
    if chosen:
        words = tokenizer.load_tokenizer(verifier_folder)
        rows = verifier.rows(verifier.documents(train, words))
        speculators.make_states(rows, verifier_folder, work)
    for name in chosen:
        speculators.train_speculator(name, verifier_folder, work, output / name)


def _build_verifier(
    train: list[corpus.SourceFile], held_out: list[corpus.SourceFile], folder: Path
) -> None:
    """Trains, and writes how it went beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    words = tokenizer.train_tokenizer((file.text for file in train), folder)
    with tempfile.TemporaryDirectory() as scratch:
        history = verifier.train_verifier(train, held_out, words, folder, Path(scratch))
    log = {
        "command": shlex.join(this_command()),
        "environment": environment(),
        "seconds": round(time.monotonic() - start),
        "history": history,
    }
    (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    run_function(rebuild)
