"""Does a speculator serve as it was trained? ``speculators check`` says so, or why not.

Four questions, in this order: is the folder what the format asks for; would vLLM alone read it, and
what would it change; does the draft compute in vLLM what it computes in Transformers; and are the
same tokens kept on both sides. What is wrong is named in one of the words of `errors.Cause`.
"""

import gc
import sys
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field
from rich.table import Table

from speculators_core.console import console, result_alone_on_stdout
from speculators_core.diagnosis.check_report import CheckReport, Counts, Severity
from speculators_core.errors import Cause, SpeculatorError
from speculators_core.settings import Settings
from speculators_vllm import offline

NOT_FIT_EXIT = 1
TRACED_TOKENS = 64
"""Tokens of the prompt on which tensors are compared, at most."""

MARKS: dict[Severity, str] = {
    "fault": "[red]fault[/]",
    "warning": "[yellow]warning[/]",
    "note": "note",
}


class CheckConfig(Settings):
    """What is checked, and on what."""

    verifier: str | None = None
    """Verifier; the one that the speculator names where none is given."""
    prompts: str | None = None
    """A JSONL file or a hub data set; a dozen general prompts where none is given."""
    limit_per_category: int | None = Field(None, ge=1)
    """Prompts of each category, at most."""
    max_tokens: int = Field(48, ge=8)
    """New tokens for each prompt."""
    k: int | None = Field(None, ge=1)
    """Speculative tokens; the checkpoint's own number where none is given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Of both models; float32 on a CPU and auto on a GPU where none is given."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """More arguments of vLLM's `LLM`, as JSON."""
    verbose: Annotated[bool, Parameter(negative=())] = False
    """Print what vLLM prints while it starts, instead of writing it to a log file."""
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
    """Print the report as JSON."""


def run(
    speculator: str,
    /,
    *,
    settings: Annotated[CheckConfig | None, Parameter(name="*")] = None,
) -> None:
    """Checks that a speculator serves as it was trained, or names what is wrong.

    Exit code 0: fit to serve; 1: not, with the cause; 2: it could not be checked.

    Parameters
    ----------
    speculator
        Folder or hub id.
    """
    settings = settings or CheckConfig()
    if settings.as_json:
        with result_alone_on_stdout():
            report = check(speculator, settings)
        print(report.model_dump_json(indent=2))
    else:
        report = check(speculator, settings)
        print_report(report)
    if not report.is_fit:
        sys.exit(NOT_FIT_EXIT)


def check(speculator: str, settings: CheckConfig) -> CheckReport:
    """The report on a speculator.

    Raises:
        SpeculatorError: there is no such speculator, or verifier or prompts are at fault.
    """
    offline.prepare(settings.verbose)
    engine_args = offline.check_names("--engine-args", settings.engine_args, offline.DECIDED)
    settings = settings.model_copy(update={"engine_args": engine_args})
    from speculators_core.format import checkpoint
    from speculators_core.format.checkpoint import locate_verifier
    from speculators_core.provenance import versions
    from speculators_core.verifier.reading import read_tokenizer, read_verifier_config

    report = CheckReport(speculator=speculator, versions=versions())
    folder = checkpoint.fetch(speculator, files=checkpoint.ALL_FILES + checkpoint.TEXT_FILES)
    raw = checkpoint.read_config(folder)
    config = _check_checkpoint(report, speculator, folder, raw)
    if config is None:
        return report
    name = settings.verifier or config.verifier.name_or_path
    if name is None:
        raise SpeculatorError(f"{speculator} names no verifier. Pass --verifier.")
    report.verifier = settings.verifier or locate_verifier(name, beside=folder)
    with offline.quiet():
        _check_served(report, speculator, folder, config, read_verifier_config(report.verifier))
        if not report.is_fit:
            return report
        _ask_stock_vllm(report, raw)
    tokenizer = read_tokenizer(report.verifier)
    _compare_templates(report, folder, tokenizer)
    report.speculative_tokens = settings.k or config.proposal.speculative_tokens
    longest = offline.longest_text(read_verifier_config(report.verifier), settings.engine_args)
    prompts = _prompts(settings, tokenizer, longest - settings.max_tokens)
    _compare_sides(report, settings, folder, prompts)
    return report


# ---- the folder ----


def _check_checkpoint(
    report: CheckReport, speculator: str, folder: Path, raw: dict[str, Any]
) -> Any:
    """The config, or None where folder and format disagree so far that nothing can be run."""
    from speculators_core.format.config import SpeculatorModelConfig
    from speculators_core.format.loading import check_checkpoint

    try:
        config = SpeculatorModelConfig.from_pretrained(folder)
        check_checkpoint(folder, config)
    except SpeculatorError as error:
        report.add("fault", "checkpoint", str(error), _cause_of(str(error)))
        return None
    for key, value in config.norm_options.items():
        if key not in raw:
            report.add(
                "warning",
                "checkpoint",
                f"{key} is not written; readers of the format differ in what they take for it "
                f"(here: {value}).",
            )
    if config.stated_layer_ids is None:
        report.add(
            "warning",
            "checkpoint",
            "aux layer ids are not written; every reader takes its own default.",
        )
    for key, value in config.proposal.lossy_options.items():
        report.add(
            "warning",
            "checkpoint",
            f"{key} is {value}: vLLM verifies exactly and ignores it.",
        )
    if (folder / "config.py").exists() or "auto_map" in raw:
        report.add("note", "checkpoint", "it ships Python code, which is never run.")
    return config


def _cause_of(message: str) -> Cause:
    """The word for what makes a checkpoint unreadable."""
    if "d2t" in message or "t2d" in message:
        return "d2t offset"
    if "layer id" in message or "layer_ids" in message:
        return "wrong layer ids"
    if "norm" in message and ("missing" in message or "has no place" in message):
        return "missing norm"
    return "damaged checkpoint"


def _check_served(
    report: CheckReport, speculator: str, folder: Path, config: Any, verifier: Any
) -> None:
    """Whether the plug-in would let vLLM have it, with this verifier."""
    from speculators_core.format import checkpoint
    from speculators_core.format.checkpoint import locate_verifier
    from speculators_core.verifier.fit import check_tokenizer, check_verifier
    from speculators_vllm.plugin.speculative_config import check_served

    try:
        check_verifier(config, verifier)
        named = config.verifier.name_or_path
        trained_with = None if named is None else locate_verifier(named, beside=folder)
        check_tokenizer(folder, trained_with, str(report.verifier))
        check_served(speculator, checkpoint.read_config(folder))
    except SpeculatorError as error:
        report.add("fault", "checkpoint", str(error), _cause_of(str(error)))


def _compare_templates(report: CheckReport, folder: Path, tokenizer: Any) -> None:
    """A chat template beside the draft is the one that it was trained with."""
    from jinja2 import TemplateError

    from speculators_core.verifier.reading import read_tokenizer

    has_own = (folder / "chat_template.jinja").exists()
    if not has_own and not (folder / "tokenizer_config.json").exists():
        return
    own = read_tokenizer(folder).chat_template if not has_own else None
    try:
        template = (folder / "chat_template.jinja").read_text("utf-8") if has_own else own
    except UnicodeDecodeError as error:
        raise SpeculatorError(f"{folder}: chat_template.jinja is no text ({error}).") from error
    if template is None:
        return
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "And that?"},
    ]

    def render(chosen: str | None) -> str | None:
        if chosen is None:
            return None
        try:
            return tokenizer.apply_chat_template(
                messages, chat_template=chosen, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise SpeculatorError(f"a chat template cannot be rendered: {error}.") from error

    trained, served = render(template), render(tokenizer.chat_template)
    if trained != served:
        report.add(
            "fault",
            "checkpoint",
            f"the chat template beside the speculator renders {_excerpt(trained, served)}; the "
            f"verifier's renders {_excerpt(served, trained)}. Serve with --chat-template "
            f"{folder / 'chat_template.jinja'}, or train with the verifier's.",
            "chat template",
        )


def _excerpt(text: str | None, other: str | None, span: int = 40) -> str:
    """What a text says from where it first differs from another."""
    if text is None:
        return "nothing"
    start = next(
        (at for at, (a, b) in enumerate(zip(text, other or "", strict=False)) if a != b),
        min(len(text), len(other or "")),
    )
    return repr(text[max(0, start - span // 2) : start + span])


# ---- stock vLLM ----


def _ask_stock_vllm(report: CheckReport, raw: dict[str, Any]) -> None:
    """What vLLM without the plug-in would do with such a checkpoint."""
    import copy

    from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

    from speculators_vllm.plugin.draft_config import DraftConfig
    from speculators_vllm.plugin.speculative_config import vllm_settings

    try:
        stock = SpeculatorsConfig.extract_transformers_pre_trained_config(copy.deepcopy(raw))
        settings = SpeculatorsConfig.extract_vllm_speculative_config(copy.deepcopy(raw))
    except (ValueError, KeyError, TypeError):
        kind = raw.get("speculators_model_type")
        report.add(
            "note",
            "stock vLLM",
            f"serves no {kind} speculator from its own folder; the plug-in does.",
        )
        return
    served = DraftConfig.extract_transformers_pre_trained_config(copy.deepcopy(raw))
    silent = ("speculative_method", "architectures")
    for key in sorted(set(stock) | set(served) - set(silent)):
        if key in silent or stock.get(key) == served.get(key):
            continue
        report.add(
            "note",
            "stock vLLM",
            f"reads {key} as {stock.get(key)!r} without a word; the plug-in as "
            f"{served.get(key)!r}.",
        )
    for key, value in vllm_settings(raw).items():
        if settings.get(key) != value:
            report.add(
                "note",
                "stock vLLM",
                f"takes {key} {settings.get(key)!r} without a word, of the first proposal method; "
                f"the default one says {value!r}.",
            )


# ---- both sides ----


def _compare_sides(
    report: CheckReport, settings: CheckConfig, folder: Path, prompts: Sequence[list[int]]
) -> None:
    """Runs the prompts through the reference decoder and through vLLM."""
    import torch

    from speculators_core.diagnosis.replay import see
    from speculators_core.diagnosis.suspects import DEAD_BELOW, diagnose
    from speculators_core.format.checkpoint import as_dtype
    from speculators_core.models.speculator import SpeculatorModel
    from speculators_core.verifier.reading import load_verifier
    from speculators_vllm.verdicts.reference import decode, pool
    from speculators_vllm.verdicts.traces import compare, trace_reference, trace_served

    assert report.verifier is not None and report.speculative_tokens is not None
    device = "cuda" if offline.has_gpu() else "cpu"
    stated = settings.dtype or ("auto" if offline.has_gpu() else "float32")
    verifier: Any = load_verifier(
        report.verifier, None if stated == "auto" else as_dtype(stated)
    ).to(device)
    dtype: torch.dtype = verifier.dtype
    model: Any = SpeculatorModel.from_pretrained(folder, verifier=verifier, dtype=dtype).to(device)
    num_tokens = report.speculative_tokens

    decoded = [decode(model, prompt, settings.max_tokens, num_tokens) for prompt in prompts]
    report.reference = _counts(pool([one.accepted for one in decoded], num_tokens))
    texts = [
        see(verifier, prompt, done.token_ids) for prompt, done in zip(prompts, decoded, strict=True)
    ]
    diagnosis = diagnose(model, verifier, texts, num_tokens)
    traced = prompts[0][:TRACED_TOKENS]
    seen = see(verifier, traced, decode(model, traced, 1, num_tokens).token_ids)
    reference_trace = {k: v.cpu() for k, v in trace_reference(model, seen, num_tokens).items()}
    del verifier, model, texts, seen
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()

    from vllm import SamplingParams

    arguments = {
        "model": report.verifier,
        "dtype": str(dtype).removeprefix("torch."),
        "max_num_seqs": 1,
        "enforce_eager": True,  # compiled passes cannot be listened to
        "speculative_config": {"model": report.speculator, "num_speculative_tokens": num_tokens},
        **settings.engine_args,  # none of those above, but for enforce_eager and max_num_seqs
    }
    with offline.loaded(**arguments) as llm:
        stages = compare(reference_trace, trace_served(llm, traced), dtype)
        parameters = SamplingParams(temperature=0, max_tokens=settings.max_tokens, ignore_eos=True)
        served = offline.continue_all(llm, prompts, parameters)
    report.served = _counts(pool([one.accepted for one in served], num_tokens))
    report.stages = [
        (stage.name, stage.difference if isfinite(stage.difference) else None) for stage in stages
    ]

    different = next((stage for stage in stages if not stage.is_equal), None)
    if different is not None:
        report.add(
            "fault",
            "tensors",
            f"{different.name} is the first tensor that vLLM computes otherwise: it differs by "
            f"{different.difference:.2g} of its largest value.",
            "served otherwise",
        )
    elif not stages:
        report.add("note", "tensors", "vLLM runs the draft in another process: not compared.")
    _compare_counts(report, decoded, served, dtype == torch.float32)
    likely = diagnosis.likely_cause
    if likely is not None:
        report.add(
            "fault",
            "reading",
            f"{likely.description}: tau would be {diagnosis.acceptance_length_if_fixed:.2f}, not "
            f"{diagnosis.acceptance_length:.2f}.",
            likely.cause,
        )
    elif report.reference.acceptance_length < DEAD_BELOW:
        report.add(
            "fault",
            "reading",
            f"tau is {report.reference.acceptance_length:.2f} in the reference decoder too, and "
            "no other way to read the weights does better: the draft was not trained for this "
            "verifier, or not at all.",
            "dead draft",
        )


def _prompts(settings: CheckConfig, tokenizer: Any, longest: int) -> list[list[int]]:
    from speculators_core.decoding.default_prompts import default_prompts
    from speculators_core.decoding.prompts import read_prompts, tokenize

    if settings.prompts is None:
        prompts = default_prompts(tokenizer)
    else:
        prompts = read_prompts(settings.prompts, settings.limit_per_category)
    return [prompt.token_ids for prompt in tokenize(prompts, tokenizer, longest)]


def _counts(counts: Any) -> Counts:
    return Counts(
        num_drafts=counts.num_drafts,
        accepted_per_position=counts.accepted_per_position,
        acceptance_length=counts.acceptance_length,
    )


def _compare_counts(
    report: CheckReport,
    decoded: Sequence[offline.Continuation],
    served: Sequence[offline.Continuation],
    is_exact: bool,
) -> None:
    """Texts and counts of both sides; below float32 of the requests whose texts agree."""
    from speculators_vllm.verdicts.reference import first_difference, pool

    pairs = list(zip(decoded, served, strict=True))
    same = [pair for pair in pairs if pair[0].token_ids == pair[1].token_ids]
    if len(same) < len(pairs):
        text = f"{len(pairs) - len(same)} of {len(pairs)} texts differ between the two sides"
        if is_exact:
            report.add("fault", "acceptance", f"{text}.", "served otherwise")
        else:
            report.add("note", "acceptance", f"{text}: below float32 near ties may fall otherwise.")
    assert report.speculative_tokens is not None
    ours = pool([one.accepted for one, _ in same], report.speculative_tokens)
    theirs = pool([one.accepted for _, one in same], report.speculative_tokens)
    place = first_difference(ours, theirs)
    if place is not None:
        found, expected = (c.accepted_per_position[place - 1] for c in (theirs, ours))
        report.add(
            "fault" if is_exact else "warning",
            "acceptance",
            f"position {place}: vLLM keeps {found} tokens of {theirs.num_drafts} drafts, the "
            f"reference decoder {expected} of {ours.num_drafts}.",
            "served otherwise" if is_exact else None,
        )


# ---- what is printed ----


def print_report(report: CheckReport) -> None:
    """Findings, both sides position by position, and the verdict."""
    console.print(f"speculator {report.speculator}")
    if report.verifier:
        console.print(f"verifier   {report.verifier}")
    if report.reference and report.served:
        table = Table(title="kept by position", title_justify="left")
        columns = range(1, (report.speculative_tokens or 0) + 1)
        for column in ("", "tau", "drafts", *map(str, columns)):
            table.add_column(column)
        for name, side in (("reference decoder", report.reference), ("vLLM", report.served)):
            kept = map(str, side.accepted_per_position)
            table.add_row(name, f"{side.acceptance_length:.3f}", str(side.num_drafts), *kept)
        console.print(table)
    finite = [(name, difference) for name, difference in report.stages if difference is not None]
    if finite:
        name, difference = max(finite, key=lambda stage: stage[1])
        console.print(
            f"{len(report.stages)} tensors of the first pass compared; largest difference "
            f"{difference:.1e} of the largest value ({name})"
        )
    for finding in report.findings:
        cause = f" ({finding.cause})" if finding.cause else ""
        console.print(f"{MARKS[finding.severity]} {finding.part}{cause}: ", end="")
        console.print(finding.text, markup=False, highlight=False)
    color = "green" if report.is_fit else "red"
    console.print(f"[{color}]{report.verdict}[/]")
