"""Checks that a speculator serves as it was trained.

Four questions, in this order: is the folder sound and made for this verifier; would vLLM alone read
it, and what would it change; does the draft compute in vLLM what it computes in Transformers; and
do both sides accept the same tokens. What is wrong has one of the names in `errors.Cause`.
"""

import copy
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from vllm import SamplingParams
from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

from speculators_core.console import console
from speculators_core.decoding.acceptance import AcceptanceCounts, merge_contexts
from speculators_core.decoding.default_prompts import default_prompts
from speculators_core.decoding.prompts import read_prompts, tokenize
from speculators_core.diagnosis.check_report import CheckReport, Counts, Severity
from speculators_core.diagnosis.contexts import ContextTrial
from speculators_core.diagnosis.replay import SeenText, see
from speculators_core.diagnosis.suspects import DEAD_BELOW, Diagnosis, diagnose
from speculators_core.errors import SpeculatorError, UnreadFormatError
from speculators_core.format import checkpoint
from speculators_core.format.checkpoint import RawConfig
from speculators_core.format.loading import names_of
from speculators_core.format.stored_speculator import StoredSpeculator
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.provenance import versions
from speculators_core.publishing.card import CARD, learnt_lengths
from speculators_core.publishing.card_facts import LearntLengths
from speculators_core.texts.chat import TemplateRefused, render_chat
from speculators_core.verifier.pair import Pair
from speculators_core.verifier.reading import read_tokenizer
from speculators_core.verifier.sizes import required_size
from speculators_vllm import offline
from speculators_vllm.plugin.draft_config import DraftConfig
from speculators_vllm.plugin.positions import can_extend
from speculators_vllm.plugin.speculative_config import check_served, vllm_settings
from speculators_vllm.verdicts.reference import decode, first_difference, load_reference, pool
from speculators_vllm.verdicts.settings import Arguments, CheckConfig, Dtype
from speculators_vllm.verdicts.traces import (
    STATES,
    Stage,
    Trace,
    compare,
    trace_reference,
    trace_served,
)
from speculators_vllm.verdicts.verifiers import (
    Scores,
    compare_verifiers,
    reference_scores,
    served_scores,
)

TRACED_TOKENS = 64
"""Maximum number of tokens of the prompt on which tensors are compared."""

TEMPLATE = "chat_template.jinja"
CONVERSATION = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": "And that?"},
]
"""Rendered in both chat templates."""
MARKS: dict[Severity, str] = {
    "fault": "[red]fault[/]",
    "warning": "[yellow]warning[/]",
    "note": "note",
}


def check(speculator: str, config: CheckConfig) -> CheckReport:
    """The report on a speculator; call `offline.prepare` first.

    Raises:
        SpeculatorError: there is no such speculator, or an option, the verifier or the prompts are
            at fault.
    """
    engine_args = offline.check_names("--engine-args", config.engine_args, offline.DECIDED)
    report = CheckReport(speculator=speculator, verifier=config.verifier, versions=versions())
    try:
        pair = Pair.open(
            speculator,
            config.verifier,
            files=(*checkpoint.ALL_FILES, *checkpoint.TEXT_FILES, CARD),
        )
        report.verifier = pair.verifier
        with offline.quiet():
            check_served(speculator, pair.speculator.raw)
    except UnreadFormatError as error:
        raise SpeculatorError(f"not checked. {error}") from error
    except SpeculatorError as error:
        if error.cause is None:
            raise
        report.add("fault", "checkpoint", str(error), error.cause)
        return report
    _warn_of_config(report, pair.speculator)
    _note_other_writing(report, pair)
    with offline.quiet():
        _ask_stock_vllm(report, pair.speculator.raw)
    tokenizer = read_tokenizer(pair.verifier)
    _compare_templates(report, pair.speculator, tokenizer)
    served_length = offline.longest_text(pair.verifier_config, engine_args)
    _warn_of_positions(report, pair.speculator, served_length)
    plan = _Plan(
        pair=pair,
        prompts=_prompts(
            config,
            tokenizer,
            served_length - config.max_tokens,
            required_size(pair.verifier_config.get_text_config(), "vocab_size"),
        ),
        num_tokens=config.k or pair.speculator.config.proposal.speculative_tokens,
        max_tokens=config.max_tokens,
        dtype=config.dtype or ("auto" if offline.has_gpu() else "float32"),
        engine_args=engine_args,
        served_length=served_length,
        learnt=learnt_lengths(pair.speculator.folder),
    )
    report.speculative_tokens = plan.num_tokens
    _compare_sides(report, plan)
    return report


# ---- the folder ----


def _warn_of_config(report: CheckReport, speculator: StoredSpeculator) -> None:
    """What other readers of the format could take otherwise."""
    config, raw = speculator.config, speculator.raw
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
    for key, setting in config.proposal.lossy_options.items():
        report.add(
            "warning",
            "checkpoint",
            f"{key} is {setting}: vLLM verifies exactly and ignores it.",
        )
    if unknown := config.unknown_keys:
        report.add(
            "note", "checkpoint", f"keys of config.json without effect: {', '.join(unknown)}."
        )
    if (speculator.folder / "config.py").exists() or "auto_map" in raw:
        report.add("note", "checkpoint", "it ships Python code, which is never run.")


def _warn_of_positions(report: CheckReport, speculator: StoredSpeculator, served: int) -> None:
    """Fewer positions than the engine's are a reason for other counts in vLLM alone."""
    layers = speculator.config.transformer_layer_config
    own = getattr(layers, "max_position_embeddings", served)
    if own >= served:
        return
    here = "The plug-in extends them."
    if not can_extend(layers):
        here = (
            f"The plug-in cannot extend such rotary embeddings: serve with --max-model-len {own}."
        )
    elif not offline.has_plugin():
        here = "The plug-in, which is off here, extends them."
    report.add(
        "warning",
        "checkpoint",
        f"max_position_embeddings is {own}, and {served} positions are served: vLLM alone drafts "
        f"nothing for a batch with a longer request. {here}",
    )


def _note_other_writing(report: CheckReport, pair: Pair) -> None:
    """What is written in another way than the format has it, and read all the same."""
    config, raw = pair.speculator.config, pair.speculator.raw
    if raw.get("tie_word_embeddings"):
        report.add("note", "checkpoint", "tie_word_embeddings is true, which no reader follows.")
    stated = raw.get(config.layer_ids_key or "")
    if stated and stated != config.aux_layer_ids:
        report.add(
            "note",
            "checkpoint",
            f"aux layer ids {stated} are read as {config.aux_layer_ids}, here and in vLLM.",
        )
    if pair.ignored_tensors:
        report.add(
            "note",
            "checkpoint",
            f"tensors without use are ignored: {names_of(pair.ignored_tensors)}.",
        )


def _note_differing_ends(report: CheckReport, model: SpeculatorModel) -> None:
    for name in model.differing_ends():
        report.add(
            "note",
            "checkpoint",
            f"{name} is not the verifier's: the draft's is used, here and in vLLM.",
        )


def _compare_templates(
    report: CheckReport, speculator: StoredSpeculator, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compares a chat template beside the draft, with which it was trained, with the verifier's."""
    trained = _template_beside(speculator)
    if trained is None:
        return
    trained_text, served_text = (
        _render(tokenizer, template) for template in (trained, tokenizer.chat_template)
    )
    if trained_text != served_text:
        report.add(
            "fault",
            "checkpoint",
            "the chat template beside the speculator renders "
            f"{_excerpt(trained_text, served_text)}; the verifier's renders "
            f"{_excerpt(served_text, trained_text)}. Serve with --chat-template "
            f"{speculator.folder / TEMPLATE}, or train with the verifier's.",
            "chat template",
        )


def _template_beside(speculator: StoredSpeculator) -> str | None:
    folder = speculator.folder
    if (folder / TEMPLATE).exists():
        try:
            return (folder / TEMPLATE).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise SpeculatorError(
                f"{folder / TEMPLATE} is not UTF-8 text ({error}). Copy it again, or remove it."
            ) from error
    if (folder / "tokenizer_config.json").exists():
        return read_tokenizer(folder).chat_template
    return None


def _render(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    """A short conversation in a template; None without one."""
    if template is None:
        return None
    try:
        return render_chat(tokenizer, CONVERSATION, template=template)
    except TemplateRefused as error:
        raise SpeculatorError(
            f"a chat template cannot be rendered: {error}; expected one that takes a user message. "
            "Repair the template beside the speculator, or the verifier's."
        ) from error


def _excerpt(text: str | None, other: str | None, span: int = 40) -> str:
    """The text around the place where it first differs from another."""
    if text is None:
        return "nothing"
    start = next(
        (at for at, (a, b) in enumerate(zip(text, other or "", strict=False)) if a != b),
        min(len(text), len(other or "")),
    )
    return repr(text[max(0, start - span // 2) : start + span])


# ---- stock vLLM ----


def _ask_stock_vllm(report: CheckReport, raw: RawConfig) -> None:
    """Notes how vLLM without the plug-in would read the checkpoint."""
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
                f"takes {key} {settings.get(key)!r} of the first proposal method without a word; "
                f"the default method has {value!r}.",
            )


# ---- both sides ----


@dataclass(frozen=True)
class _Plan:
    """What both sides run."""

    pair: Pair
    prompts: Sequence[list[int]]
    num_tokens: int
    max_tokens: int
    dtype: Dtype
    engine_args: Arguments
    served_length: int
    """Most tokens that vLLM takes of a text."""
    learnt: LearntLengths | None
    """Lengths of the examples that the draft was trained on, where its card states them."""

    @property
    def longest_context(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(map(len, self.prompts)) + self.max_tokens

    @property
    def traced(self) -> list[int]:
        """The prompt on which tensors are compared."""
        return self.prompts[0][:TRACED_TOKENS]

    def with_answers(self, continuations: Sequence[offline.Continuation]) -> list[list[int]]:
        """The prompts with what follows; some have a single token."""
        pairs = zip(self.prompts, continuations, strict=True)
        return [prompt + answer.token_ids for prompt, answer in pairs]


@dataclass(frozen=True)
class _Side:
    """What one side gave."""

    continuations: list[offline.Continuation]
    trace: Trace
    scores: Scores
    """The verifier's alone."""

    def counts(self, prompts: Sequence[list[int]], num_tokens: int) -> Counts:
        accepted = [one.accepted for one in self.continuations]
        parts = [
            AcceptanceCounts(num_tokens, kept).by_context(len(prompt))
            for prompt, kept in zip(prompts, accepted, strict=True)
        ]
        return Counts.of(pool(accepted, num_tokens), merge_contexts(parts, num_tokens))


def _compare_sides(report: CheckReport, plan: _Plan) -> None:
    """Runs the prompts through the reference decoder and through vLLM."""
    reference, seen, dtype, diagnosis = _run_reference(report, plan)
    written = plan.with_answers(reference.continuations)
    gc.collect()  # vLLM takes the memory that the reference had
    torch.cuda.empty_cache()
    served = _run_vllm(plan, dtype, written)
    report.reference = reference.counts(plan.prompts, plan.num_tokens)
    report.served = served.counts(plan.prompts, plan.num_tokens)
    verifiers = compare_verifiers(plan.pair.verifier_config, reference.scores, served.scores, dtype)
    trace = reference.trace
    if not verifiers.is_equal:
        report.verifier_difference = verifiers.largest
        report.add("warning", "verifier", f"{verifiers}. The draft is judged on vLLM's states.")
        if STATES in served.trace:
            model = load_reference(plan.pair, plan.dtype)
            trace = _trace(model, seen, plan.num_tokens, served.trace[STATES])
    _compare_tensors(report, compare(trace, served.trace, dtype))
    is_exact = verifiers.is_equal and dtype == torch.float32
    reason = "below float32" if verifiers.is_equal else "with verifiers that differ"
    _compare_counts(report, plan.num_tokens, reference, served, None if is_exact else reason)
    _explain(report, report.reference, diagnosis)
    _warn_of_length(report, plan, diagnosis.context)


def _run_reference(
    report: CheckReport, plan: _Plan
) -> tuple[_Side, SeenText, torch.dtype, Diagnosis]:
    model = load_reference(plan.pair, plan.dtype)
    _note_differing_ends(report, model)
    verifier, num_tokens = model.verifier, plan.num_tokens
    decoded = [decode(model, prompt, plan.max_tokens, num_tokens) for prompt in plan.prompts]
    texts = [
        see(verifier, prompt, done.token_ids)
        for prompt, done in zip(plan.prompts, decoded, strict=True)
    ]
    learnt = plan.learnt.longest if plan.learnt else None
    diagnosis = diagnose(model, verifier, texts, num_tokens, learnt)
    seen = see(verifier, plan.traced, decode(model, plan.traced, 1, num_tokens).token_ids)
    scores = reference_scores(verifier, plan.with_answers(decoded))
    side = _Side(decoded, _trace(model, seen, num_tokens), scores)
    return side, seen, verifier.dtype, diagnosis


def _trace(
    model: SpeculatorModel, seen: SeenText, num_tokens: int, served_states: Tensor | None = None
) -> Trace:
    traced = trace_reference(model, seen, num_tokens, served_states)
    return {name: found.cpu() for name, found in traced.items()}


def _run_vllm(plan: _Plan, dtype: torch.dtype, written: Sequence[list[int]]) -> _Side:
    speculative = {
        "model": plan.pair.speculator.name,
        "num_speculative_tokens": plan.num_tokens,
    }
    arguments = {
        "model": plan.pair.verifier,
        "dtype": str(dtype).removeprefix("torch."),
        "max_num_seqs": 1,
        "enforce_eager": True,  # hooks see nothing of compiled passes
        "speculative_config": speculative,
        **plan.engine_args,  # none of those above, but for enforce_eager and max_num_seqs
    }
    with offline.loaded(**arguments) as llm:
        trace = trace_served(llm, plan.traced)
        parameters = SamplingParams(temperature=0, max_tokens=plan.max_tokens, ignore_eos=True)
        continuations = offline.continue_all(llm, plan.prompts, parameters)
        return _Side(continuations, trace, served_scores(llm, written))


def _compare_tensors(report: CheckReport, stages: Sequence[Stage]) -> None:
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


def _compare_counts(
    report: CheckReport, num_tokens: int, reference: _Side, served: _Side, excuse: str | None
) -> None:
    """Texts and counts of both sides; with an excuse, those of the requests whose texts agree.

    ``excuse`` states why sound texts may differ; None where they must be equal.
    """
    pairs = list(zip(reference.continuations, served.continuations, strict=True))
    same = [pair for pair in pairs if pair[0].token_ids == pair[1].token_ids]
    if len(same) < len(pairs):
        text = f"{len(pairs) - len(same)} of {len(pairs)} texts differ between the two sides"
        if excuse is None:
            report.add("fault", "acceptance", f"{text}.", "served otherwise")
        else:
            report.add("note", "acceptance", f"{text}: {excuse} near ties may fall otherwise.")
    ours = pool([one.accepted for one, _ in same], num_tokens)
    theirs = pool([one.accepted for _, one in same], num_tokens)
    place = first_difference(ours, theirs)
    if place is not None:
        found, expected = (c.accepted_per_position[place - 1] for c in (theirs, ours))
        report.add(
            "fault" if excuse is None else "warning",
            "acceptance",
            f"position {place}: vLLM accepts {found} tokens of {theirs.num_drafts} drafts, the "
            f"reference decoder {expected} of {ours.num_drafts}.",
            "served otherwise" if excuse is None else None,
        )


def _explain(report: CheckReport, reference: Counts, diagnosis: Diagnosis) -> None:
    """Names the reading of the weights that would do better, or a draft that none helps."""
    likely = diagnosis.likely_cause
    if diagnosis.context is not None and diagnosis.is_length_the_cause:
        _blame_context(report, diagnosis.context)
    elif likely is not None:
        report.add(
            "fault",
            "reading",
            f"{likely.description}: tau would be {diagnosis.acceptance_length_if_fixed:.2f}, not "
            f"{diagnosis.acceptance_length:.2f}.",
            likely.cause,
        )
    elif reference.acceptance_length < DEAD_BELOW:
        report.add(
            "fault",
            "reading",
            f"tau is {reference.acceptance_length:.2f} in the reference decoder too, and no other "
            "way to read the weights does better: the draft was not trained for this verifier, or "
            "not at all.",
            "dead draft",
        )


def _blame_context(report: CheckReport, trial: ContextTrial) -> None:
    limit = f"{trial.window:,} tokens"
    report.add(
        "fault",
        "reading",
        f"contexts of up to {trial.longest:,} tokens, longer than {limit}: beyond these tau is "
        f"{trial.whole.acceptance_length:.2f}, and would be {trial.short.acceptance_length:.2f} if "
        f"the draft saw the last {limit} alone. Train it on examples as long as the texts that you "
        "serve.",
        "context longer than trained",
    )


def _warn_of_length(report: CheckReport, plan: _Plan, trial: ContextTrial | None) -> None:
    """Names the lengths at which the draft is used, where they exceed those that it has learnt."""
    learnt, used = plan.learnt, plan.longest_context
    if learnt is None:
        report.add(
            "note", "checkpoint", "the lengths of the examples that it was trained on are unknown."
        )
    elif plan.served_length > learnt.longest:
        beyond = f"the prompts reach {used:,} with their answers, and " * (used > learnt.longest)
        lost = (
            f" Beyond {trial.window:,} tokens tau is {trial.whole.acceptance_length:.2f}, and "
            f"{trial.short.acceptance_length:.2f} with the last {trial.window:,} of them alone."
            if trial is not None
            else ""
        )
        report.add(
            "warning",
            "checkpoint",
            f"it was trained on examples of {learnt}; {beyond}vLLM serves texts of up to "
            f"{plan.served_length:,}.{lost} Measure it at the lengths that you serve, or lower "
            "max_model_len.",
        )


def _prompts(
    config: CheckConfig, tokenizer: PreTrainedTokenizerBase, longest: int, vocab_size: int
) -> list[list[int]]:
    if config.prompts is None:
        prompts = default_prompts(tokenizer)
    else:
        prompts = read_prompts(config.prompts, config.limit_per_category)
    return [
        prompt.token_ids
        for prompt in tokenize(prompts, tokenizer, longest, config.template_options, vocab_size)
    ]


# ---- what is printed ----


def _context_table(reference: Counts) -> Table:
    table = Table(title="by context length, reference decoder", title_justify="left")
    for column in ("tokens", "drafts", "tau", "conditional"):
        table.add_column(column)
    for name, part in reference.contexts.items():
        rates = [f"{kept / reached:.2f}" for reached, kept in part.reached_and_kept if reached]
        tau = f"{part.acceptance_length:.3f}"
        table.add_row(name, str(part.num_drafts), tau, " ".join(rates))
    return table


def print_report(report: CheckReport) -> None:
    """Findings, both sides position by position, and the verdict."""
    console.print(f"speculator {report.speculator}")
    if report.verifier:
        console.print(f"verifier   {report.verifier}")
    if report.reference and report.served:
        if worst := report.reference.worst_cell:
            console.print(f"worst at {worst}")
        table = Table(title="accepted by position", title_justify="left")
        columns = range(1, (report.speculative_tokens or 0) + 1)
        for column in ("", "tau", "drafts", *map(str, columns)):
            table.add_column(column)
        for name, side in (("reference decoder", report.reference), ("vLLM", report.served)):
            accepted = map(str, side.accepted_per_position)
            table.add_row(name, f"{side.acceptance_length:.3f}", str(side.num_drafts), *accepted)
        console.print(table)
        console.print(_context_table(report.reference))
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
