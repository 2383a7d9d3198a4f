"""How much of what speculators propose is kept, and what that gains.

``python -m benchmarks.acceptance`` and ``speculators acceptance``. Runs the same prompts without
speculation and with each draft in one run, on vLLM or on the reference decoder.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field

from speculators_core.errors import SpeculatorError
from speculators_core.settings import Settings
from speculators_vllm import offline

SHIPPED = {
    "vllm": ("eagle3", "peagle", "dflash"),
    "transformers": ("eagle3", "peagle", "dflash", "mtp"),
}
"""The playground's speculators that each engine runs where none is named."""
YARDSTICK_K = 3
"""Tokens that a draft proposes in one step where neither it nor the caller says how many."""


class AcceptanceSettings(Settings):
    """What is measured, and on what."""

    model: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = ()
    """Drafts to compare: speculators or language models (folders or hub ids), prompt-lookup, and
    assisted (Transformers' own prompt lookup); the playground's speculators where none is given."""
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
    """Requests at one time."""
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
    """Measures the acceptance and speed of drafts beside their verifier alone."""
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
        offline.prepare()
    elif settings.engine_args:
        raise SpeculatorError(
            f"--engine-args are vLLM's; found {', '.join(settings.engine_args)} with "
            "--engine transformers."
        )
    from benchmarks.engines import Decoding, Draft, warm_up
    from benchmarks.report import DraftReport, Report, environment, hash_weights, report_k
    from benchmarks.statistics import tokens_per_second
    from speculators_core.console import progress
    from speculators_core.prompts import hash_prompts

    checked = _check_inputs(settings)
    prompts = checked.prompts
    dtype = settings.dtype or ("auto" if offline.has_gpu() else "float32")
    engine_args: dict[str, Any] = {}
    if settings.engine == "vllm":
        engine_args = {
            **offline.default_arguments(),
            "seed": settings.seed,
            **settings.engine_args,
        }
    engine = _engine(settings, checked, dtype, engine_args)
    decoding = Decoding(
        settings.max_tokens, settings.temperature, settings.seed, settings.ignore_eos
    )

    def run_all(draft: Draft | None) -> list[Any]:
        what = (
            "alone" if draft is None else f"{Path(draft.name).name}, K = {draft.speculative_tokens}"
        )
        with engine.loaded(draft) as runner, progress(what, settings.runs * len(prompts)) as done:
            warm_up(runner, prompts, decoding)
            return [
                runner.run(prompts, replace(decoding, seed=settings.seed + run), done)
                for run in range(settings.runs)
            ]

    baseline = run_all(None)
    drafts = []
    for found in checked.drafts:
        by_k = [
            report_k(
                count,
                run_all(Draft(found.kind, found.name, count)),
                baseline,
                greedy=settings.temperature == 0,
            )
            for count in settings.k or (found.default_k,)
        ]
        weights = None if found.folder is None else hash_weights(found.folder)
        drafts.append(DraftReport(name=found.name, kind=found.kind, sha256=weights, by_k=by_k))
    return Report(
        settings={**settings.model_dump(mode="json"), "dtype": dtype, "engine_args": engine_args},
        verifier=checked.verifier,
        verifier_sha256=hash_weights(checked.verifier),
        environment=environment(),
        prompts_sha256=hash_prompts(prompts),
        baseline_tokens_per_s=[tokens_per_second(records) for records in baseline],
        baseline_requests=baseline[0],
        drafts=drafts,
    )


@dataclass(frozen=True)
class _FoundDraft:
    """A draft that was found to be whole and to fit its verifier."""

    kind: Any
    name: str
    default_k: int
    config: Any = None
    """Of a speculator or a language model."""
    folder: Path | None = None
    verifier: str | None = None
    """The one that a speculator names."""


@dataclass(frozen=True)
class _Checked:
    """What a run needs, found to be whole and to fit together."""

    verifier: str
    drafts: list[_FoundDraft]
    prompts: list[Any]


def _check_inputs(settings: AcceptanceSettings) -> _Checked:
    from benchmarks import playground
    from speculators_core.prompts import read_prompts, tokenize
    from speculators_core.verifier import read_tokenizer, read_verifier_config

    shipped = [str(playground.SPECULATORS[name]) for name in SHIPPED[settings.engine]]
    source = playground.PROMPTS if settings.prompts == "playground" else settings.prompts
    prompts = read_prompts(source, settings.limit_per_category)
    drafts = [_find_draft(name, settings) for name in settings.model or shipped]
    if settings.engine == "vllm":  # 0.32 cannot start again in a process that ran its n-gram
        drafts.sort(key=lambda draft: draft.kind == "prompt-lookup")
    named = settings.verifier or next((d.verifier for d in drafts if d.verifier), None)
    if named is None:
        raise SpeculatorError(
            f"{', '.join(settings.model)}: no verifier is named. Pass --verifier."
        )
    verifier_config = read_verifier_config(named)
    for draft in drafts:
        _check_draft(draft, named, verifier_config)
    longest = getattr(verifier_config.get_text_config(), "max_position_embeddings", sys.maxsize)
    stated = settings.engine_args.get("max_model_len", longest)
    if not isinstance(stated, int):
        raise SpeculatorError(f"--engine-args max_model_len: expected a number, found {stated!r}.")
    longest = min(longest, stated)
    return _Checked(named, drafts, tokenize(prompts, read_tokenizer(named), longest))


def _find_draft(name: str, settings: AcceptanceSettings) -> _FoundDraft:
    """Raises SpeculatorError where there is no such draft, or the engine has no such method."""
    from speculators_core import checkpoint
    from speculators_core.config import SpeculatorModelConfig
    from speculators_core.verifier import locate_verifier, read_verifier_config

    if name in ("prompt-lookup", "assisted"):
        if name == "assisted" and (settings.engine == "vllm" or settings.concurrency > 1):
            raise SpeculatorError(
                "assisted is Transformers' own decoding, one request at a time: use it with "
                "--engine transformers --concurrency 1."
            )
        if settings.engine == "vllm" and len(settings.k) > 1:
            raise SpeculatorError(
                "vLLM 0.32 cannot start again in a process that ran its prompt lookup: pass one "
                f"number to --k, found {' '.join(map(str, settings.k))}."
            )
        return _FoundDraft(name, name, YARDSTICK_K)
    folder = checkpoint.fetch(name)
    raw = checkpoint.read_config(folder)
    if "speculators_model_type" not in raw and "model_type" in raw:
        return _FoundDraft("language-model", name, YARDSTICK_K, read_verifier_config(name), folder)
    config = SpeculatorModelConfig.from_pretrained(folder)
    if settings.engine == "vllm":
        from speculators_vllm.speculative_config import check_served

        check_served(name, raw)
    verifier = config.verifier.name_or_path
    if verifier is not None:
        verifier = locate_verifier(verifier, beside=folder)
    default_k = config.proposal.speculative_tokens
    return _FoundDraft("speculator", name, default_k, config, folder, verifier)


def _check_draft(draft: _FoundDraft, verifier: str, verifier_config: Any) -> None:
    """Raises SpeculatorError unless the draft is whole and made for this verifier."""
    from speculators_core.independent import check_shared_vocabulary
    from speculators_core.model import SpeculatorModel
    from speculators_core.verifier import check_verifier

    if draft.kind == "speculator" and draft.folder is not None:
        check_verifier(draft.config, verifier_config)
        SpeculatorModel.check_checkpoint(draft.folder, draft.config)
    elif draft.kind == "language-model":
        check_shared_vocabulary(draft.config, draft.name, verifier_config, verifier)


def _engine(
    settings: AcceptanceSettings, checked: _Checked, dtype: str, engine_args: dict[str, Any]
) -> Any:
    from benchmarks.engines import TransformersEngine, VLLMEngine

    if settings.engine == "transformers":
        return TransformersEngine(checked.verifier, dtype, settings.concurrency)
    return VLLMEngine(checked.verifier, dtype, settings.concurrency, engine_args)


if __name__ == "__main__":
    from speculators_core.cli import main

    main(["acceptance", *sys.argv[1:]])
