"""How much of what a speculator proposes is kept, and what that gains.

``python -m benchmarks.acceptance`` and ``speculators acceptance``. Runs the same prompts without
and with speculation in one run, on vLLM or on the reference decoder.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field

from speculators_core.errors import SpeculatorError


class AcceptanceSettings(BaseModel):
    """What is measured, and on what."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str | None = None
    """Speculator: a folder or a hub id; the playground's EAGLE-3 where none is given."""
    verifier: str | None = None
    """Verifier; the one that the speculator names where none is given."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """vLLM, or the reference decoder."""
    prompts: str = "playground"
    """The word playground, a JSONL file, or a hub data set."""
    k: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Parameter(consume_multiple=True, negative=())
    ] = ()
    """Numbers of speculative tokens to measure; the checkpoint's own where none is given."""
    temperature: float = Field(0.0, ge=0.0)
    """0 is greedy; above it outputs are sampled and not compared."""
    max_tokens: int = Field(128, ge=1)
    """New tokens for each prompt, at most."""
    limit_per_category: int | None = Field(None, ge=1)
    """Prompts of each category, at most."""
    runs: int = Field(1, ge=1)
    """Repetitions of everything; speeds are medians."""
    concurrency: int = Field(1, ge=1)
    """Requests at one time; the reference decoder takes one."""
    seed: int = 0
    """Of sampling; each further run adds one."""
    ignore_eos: bool = False
    """Go on past the end of a text, up to max_tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Of both models; float32 on a CPU and auto on a GPU where none is given."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """More arguments of vLLM's `LLM`, as JSON."""
    output: Path | None = None
    """Folder for report.json and acceptance.png."""


def run(*, settings: Annotated[AcceptanceSettings | None, Parameter(name="*")] = None) -> None:
    """Measures a speculator's acceptance and speed beside its verifier alone."""
    from benchmarks.report import print_report, write_report

    settings = settings or AcceptanceSettings()
    if settings.output is not None:
        _make_writable(settings.output)
    report = measure(settings)
    print_report(report)
    if settings.output is not None:
        write_report(report, settings.output)


def _make_writable(folder: Path) -> None:
    """A run that cannot be written is refused before it starts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpeculatorError(f"{folder}: cannot write reports there ({error}).") from error


def measure(settings: AcceptanceSettings) -> Any:
    """The report of a run.

    Raises:
        SpeculatorError: speculator, verifier or prompts are at fault; nothing was loaded yet.
    """
    if settings.engine == "vllm":
        _prepare_vllm()
    elif settings.temperature > 0 or settings.concurrency > 1:
        raise SpeculatorError(
            "the reference decoder is greedy and takes one request at a time. Use --engine vllm, "
            "or --temperature 0 --concurrency 1."
        )
    from benchmarks.engines import Decoding, warm_up
    from benchmarks.prompts import hash_prompts
    from benchmarks.report import Report, environment, hash_weights, report_k
    from benchmarks.statistics import tokens_per_second
    from speculators_core.console import progress

    checked = _check_inputs(settings)
    prompts = checked.prompts
    dtype = settings.dtype or ("auto" if _has_gpu() else "float32")
    engine_args: dict[str, Any] = {} if _has_gpu() else {"enforce_eager": True}
    engine_args |= {"seed": settings.seed, **settings.engine_args}
    engine = _engine(settings, checked, dtype, engine_args)
    decoding = Decoding(
        settings.max_tokens, settings.temperature, settings.seed, settings.ignore_eos
    )
    counts = settings.k or (checked.default_k,)
    runs: dict[int | None, list[Any]] = {}
    for count in (None, *counts):
        what = "without speculation" if count is None else f"K = {count}"
        with engine.loaded(count) as runner, progress(what, settings.runs * len(prompts)) as done:
            warm_up(runner, prompts, decoding)
            runs[count] = [
                runner.run(prompts, replace(decoding, seed=settings.seed + run), done)
                for run in range(settings.runs)
            ]
    baseline = runs.pop(None)
    return Report(
        settings={**settings.model_dump(mode="json"), "dtype": dtype, "engine_args": engine_args},
        verifier=checked.verifier,
        verifier_sha256=hash_weights(checked.verifier),
        speculator=checked.speculator,
        speculator_sha256=hash_weights(checked.folder),
        environment=environment(),
        prompts_sha256=hash_prompts(prompts),
        baseline_tokens_per_s=[tokens_per_second(records) for records in baseline],
        baseline_requests=baseline[0],
        by_k=[
            report_k(count, runs[count], baseline, greedy=settings.temperature == 0)
            for count in counts
        ],
    )


@dataclass(frozen=True)
class _Checked:
    """What a run needs, found to be whole and to fit together."""

    speculator: str
    folder: Path
    verifier: str
    default_k: int
    prompts: list[Any]


def _check_inputs(settings: AcceptanceSettings) -> _Checked:
    from benchmarks import playground
    from benchmarks.prompts import read_prompts, tokenize
    from speculators_core import checkpoint
    from speculators_core.config import SpeculatorModelConfig
    from speculators_core.model import SpeculatorModel
    from speculators_core.verifier import check_verifier, locate_verifier, read_verifier_config

    speculator = settings.model or str(playground.EAGLE3)
    prompts = read_prompts(settings.prompts, settings.limit_per_category)
    folder = checkpoint.fetch(speculator)
    config = SpeculatorModelConfig.from_pretrained(folder)
    named = settings.verifier or config.verifier.name_or_path
    if named is None:
        raise SpeculatorError(f"{speculator} names no verifier. Pass --verifier.")
    verifier = locate_verifier(named, beside=None if settings.verifier else folder)
    verifier_config = read_verifier_config(verifier)
    check_verifier(config, verifier_config)
    SpeculatorModel.check_checkpoint(folder, config)
    longest = verifier_config.get_text_config().max_position_embeddings
    longest = min(longest, settings.engine_args.get("max_model_len", longest))
    tokenized = tokenize(prompts, _tokenizer(verifier), longest)
    return _Checked(speculator, folder, verifier, config.proposal.speculative_tokens, tokenized)


def _engine(
    settings: AcceptanceSettings, checked: _Checked, dtype: str, engine_args: dict[str, Any]
) -> Any:
    from benchmarks.engines import TransformersEngine, VLLMEngine

    models = (checked.verifier, checked.speculator, dtype)
    if settings.engine == "transformers":
        return TransformersEngine(*models)
    return VLLMEngine(*models, settings.concurrency, engine_args)


def _prepare_vllm() -> None:
    """vLLM in this process and quiet, and on a CPU Intel's OpenMP under it."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise SpeculatorError(
            "vLLM is not installed. Install speculators-vllm[cpu] or speculators-vllm[cuda], or "
            "measure with --engine transformers."
        )
    from speculators_vllm import openmp

    openmp.preload()
    if not _has_gpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _tokenizer(verifier: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(verifier)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpeculatorError(
            f"{verifier}: no tokenizer that Transformers reads: {reason}"
        ) from error


if __name__ == "__main__":
    from speculators_core.cli import main

    main(["acceptance", *sys.argv[1:]])
