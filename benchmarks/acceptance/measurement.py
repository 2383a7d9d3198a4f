"""Acceptance and speed of drafts, measured.

Runs the same prompts without speculation and with each draft, on vLLM, on the reference decoder, or
on running servers.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import JsonValue
from transformers import PretrainedConfig

from benchmarks import playground
from benchmarks.acceptance import live
from benchmarks.acceptance.drafts import FoundDraft, find_draft
from benchmarks.acceptance.engines import Decoding, Draft, Engine, warm_up
from benchmarks.acceptance.live_engine import LiveEngine
from benchmarks.acceptance.report import (
    print_report,
    read_report,
    report_k,
    write_plots,
    write_report,
)
from benchmarks.acceptance.settings import AcceptanceConfig
from benchmarks.acceptance.statistics import latency, tokens_per_second
from benchmarks.acceptance.transformers_engine import TransformersEngine
from speculators_core.console import progress
from speculators_core.decoding.prompts import (
    TokenizedPrompt,
    hash_prompts,
    read_prompts,
    tokenize,
)
from speculators_core.diagnosis.acceptance_report import (
    AcceptanceReport,
    Counters,
    DraftReport,
    KReport,
    RequestRecord,
)
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.provenance import environment, hash_weights
from speculators_core.publishing.card import learnt_lengths
from speculators_core.verifier.pair import config_of_named_verifier
from speculators_core.verifier.reading import read_tokenizer, read_verifier_config
from speculators_core.verifier.sizes import required_size
from speculators_vllm import offline


def measure_and_write(config: AcceptanceConfig) -> None:
    """Measures, prints the report and writes it to the output folder, if there is one.

    With ``config.report`` that report is printed and drawn again.

    Raises:
        SpeculatorError: as `measure`, the output cannot be written, or the report cannot be read.
    """
    if config.output is not None:
        _make_writable(config.output)
    if config.report is not None:
        earlier = read_report(config.report)
        print_report(earlier)
        write_plots(earlier, config.output or config.report.parent)
        return
    report = measure(config)
    print_report(report)
    if config.output is not None:
        write_report(report, config.output)


def _make_writable(folder: Path) -> None:
    """Makes the folder, so that a report which cannot be written is refused before the run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpeculatorError(
            f"--output {folder} cannot be made: {first_line(error)}. Name a folder that can be "
            "written."
        ) from error


def measure(config: AcceptanceConfig) -> AcceptanceReport:
    """The report of a run; where vLLM runs in this process, call `offline.prepare` first.

    Raises:
        SpeculatorError: before anything is loaded, if options, speculator, verifier, prompts or a
            server are at fault; later, if a server fails.
    """
    config.check()
    inputs = _find_inputs(config)
    engine, resolved = _make_engine(config, inputs)
    has_baseline = not inputs.servers or "baseline" in inputs.servers
    baseline = _run_all(engine, None, inputs, config) if has_baseline else _Measured([], None)
    remarks = baseline.remarks("without speculation")
    drafts = []
    for found in inputs.drafts:
        by_k = []
        for count in config.k or (found.default_k,):
            draft = Draft(found.kind, found.name, count)
            measured = _run_all(engine, draft, inputs, config)
            greedy = config.temperature == 0
            by_k.append(report_k(count, measured.runs, baseline.runs, greedy, measured.counters))
            remarks += measured.remarks("with speculation")
        remarks += _remark_of_length(found, by_k[0])
        weights = None if found.folder is None else hash_weights(found.folder)
        drafts.append(DraftReport(name=found.name, kind=found.kind, sha256=weights, by_k=by_k))
    return AcceptanceReport(
        settings={**config.model_dump(mode="json"), **resolved},
        verifier=inputs.verifier,
        verifier_sha256=hash_weights(inputs.verifier),
        environment=environment("client device" if inputs.servers else "device"),
        servers={role: asdict(server) for role, server in inputs.servers.items()},
        prompts_sha256=hash_prompts(inputs.prompts),
        baseline_tokens_per_s=[tokens_per_second(records) for records in baseline.runs],
        baseline_requests=baseline.runs[0] if baseline.runs else [],
        baseline_latency=latency([record for run in baseline.runs for record in run]),
        drafts=drafts,
        remarks=remarks,
    )


@dataclass(frozen=True)
class _Measured:
    """All runs of one draft, or of the verifier alone."""

    runs: list[list[RequestRecord]]
    counters: Counters | None
    """A server's counts during the runs."""

    def remarks(self, how: str) -> list[str]:
        return [] if self.counters is None else live.remarks(how, self.runs, self.counters)


def _run_all(
    engine: Engine, draft: Draft | None, inputs: "_Inputs", config: AcceptanceConfig
) -> _Measured:
    prompts = inputs.prompts
    decoding = Decoding(config.max_tokens, config.temperature, config.seed, config.ignore_eos)
    what = "alone" if draft is None else f"{Path(draft.name).name}, K = {draft.speculative_tokens}"
    with engine.loaded(draft) as runner, progress(what, config.runs * len(prompts)) as done:
        warm_up(runner, prompts, decoding)
        before = runner.counters()
        runs = [
            runner.run(prompts, replace(decoding, seed=config.seed + run), done)
            for run in range(config.runs)
        ]
        after = runner.counters()
        return _Measured(runs, None if before is None or after is None else after - before)


def _remark_of_length(found: FoundDraft, entry: KReport) -> list[str]:
    """Names a draft that was measured in longer texts than it has learnt."""
    learnt = None if found.folder is None else learnt_lengths(found.folder)
    longest = max((r.num_prompt_tokens + len(r.output_ids) for r in entry.requests), default=0)
    if learnt is None or longest <= learnt.longest:
        return []
    return [
        f"{Path(found.name).name}: trained on examples of {learnt}, measured in texts of up to "
        f"{longest:,}"
    ]


# ---- inputs ----


@dataclass(frozen=True)
class _Inputs:
    """Verifier, drafts, prompts and servers of a run, which fit together."""

    verifier: str
    drafts: list[FoundDraft]
    prompts: list[TokenizedPrompt]
    servers: Mapping[str, live.Server] = field(default_factory=dict)


def _find_inputs(config: AcceptanceConfig) -> _Inputs:
    source = playground.PROMPTS if config.prompts == "playground" else config.prompts
    prompts = read_prompts(source, config.limit_per_category)
    servers: Mapping[str, live.Server] = {}
    if config.server.base_url:
        verifier, servers = live.find(config.server, config.verifier)
        drafts = [_served_draft(config, servers["speculating"])]
    else:
        verifier, drafts = _find_drafts(config)
    verifier_config = _read_verifier_config(config, verifier, drafts)
    for draft in drafts:
        draft.check(verifier, verifier_config, for_vllm=config.runs_vllm or bool(servers))
    longest = offline.longest_text(verifier_config, config.engine_args)
    longest = min([longest, *(server.max_model_len for server in servers.values())])
    tokenizer = read_tokenizer(verifier)
    vocab_size = required_size(verifier_config.get_text_config(), "vocab_size")
    tokenized = tokenize(prompts, tokenizer, longest, config.template_options, vocab_size)
    return _Inputs(verifier, drafts, tokenized, servers)


def _find_drafts(config: AcceptanceConfig) -> tuple[str, list[FoundDraft]]:
    """The verifier, and the drafts for an engine in this process."""
    shipped = map(str, playground.SPECULATORS.values())
    drafts = [find_draft(name, config.runs_vllm) for name in config.model or shipped]
    if config.runs_vllm:  # 0.32 cannot start again in a process that ran its n-gram
        drafts.sort(key=lambda draft: draft.kind == "prompt-lookup")
    verifier = config.verifier or next((d.verifier for d in drafts if d.verifier), None)
    if verifier is None:
        raise SpeculatorError(f"{', '.join(config.model)}: no verifier is named. Pass --verifier.")
    return verifier, drafts


def _read_verifier_config(
    config: AcceptanceConfig, verifier: str, drafts: list[FoundDraft]
) -> PretrainedConfig:
    naming = (d.speculator for d in drafts if d.speculator and d.verifier == verifier)
    if not config.verifier and (speculator := next(naming, None)):
        return config_of_named_verifier(speculator)
    return read_verifier_config(verifier)


def _served_draft(config: AcceptanceConfig, server: live.Server) -> FoundDraft:
    name = config.model[0] if config.model else server.url.partition("//")[2]
    folder = Path(name) if Path(name).is_dir() else None
    return FoundDraft("served", name, server.speculative_tokens, folder)


def _make_engine(config: AcceptanceConfig, inputs: _Inputs) -> tuple[Engine, dict[str, JsonValue]]:
    """The engine, and its settings where the user left them open."""
    concurrency = config.concurrency
    if inputs.servers:
        server, baseline = inputs.servers["speculating"], inputs.servers.get("baseline")
        return LiveEngine(server, baseline, concurrency, config.server), {"engine": "server"}
    dtype = config.dtype or ("auto" if offline.has_gpu() else "float32")
    if config.engine == "transformers":
        return TransformersEngine(inputs.verifier, dtype, concurrency), {"dtype": dtype}
    with offline.quiet():
        from benchmarks.acceptance.vllm_engine import VLLMEngine  # vLLM is optional

    engine_args = {**offline.default_arguments(), "seed": config.seed, **config.engine_args}
    engine = VLLMEngine(inputs.verifier, dtype, concurrency, engine_args)
    return engine, {
        "dtype": dtype,
        "engine_args": engine_args,
        "vllm_plugins": os.environ.get("VLLM_PLUGINS"),
    }
