"""Acceptance and speed of drafts, measured.

``python -m benchmarks.acceptance`` and ``speculators acceptance``. Runs the same prompts without
speculation and with each draft in one run, on vLLM, on the reference decoder, or on servers that
run already.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.acceptance.settings import AcceptanceConfig
from speculators_core.errors import SpeculatorError
from speculators_vllm import offline

if TYPE_CHECKING:
    from benchmarks.acceptance.drafts import FoundDraft


def measure_and_write(settings: AcceptanceConfig) -> None:
    """Measures, prints the report and writes it to ``settings.output``.

    Raises:
        SpeculatorError: as `measure`, or the output cannot be written.
    """
    from benchmarks.acceptance.report import print_report, write_report

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


def measure(settings: AcceptanceConfig) -> Any:
    """The report of a run.

    Raises:
        SpeculatorError: options, speculator, verifier, prompts or a server are at fault; nothing
            was loaded yet. Or a server failed on the way.
    """
    _check_options(settings)
    if settings.engine == "vllm" and not settings.server.base_url:
        offline.prepare(settings.verbose)
    # After `prepare`: these import torch.
    from benchmarks.acceptance.engines import Draft
    from benchmarks.acceptance.report import report_k
    from benchmarks.acceptance.statistics import latency, tokens_per_second
    from speculators_core.decoding.prompts import hash_prompts
    from speculators_core.diagnosis.acceptance_report import AcceptanceReport, DraftReport
    from speculators_core.provenance import environment, hash_weights

    checked = _check_inputs(settings)
    engine, chosen = _engine(settings, checked)
    has_baseline = not checked.servers or "baseline" in checked.servers
    baseline = _run_all(engine, None, checked, settings) if has_baseline else _Measured([], None)
    remarks = baseline.remarks("without speculation")
    drafts = []
    for found in checked.drafts:
        by_k = []
        for count in settings.k or (found.default_k,):
            draft = Draft(found.kind, found.name, count)
            measured = _run_all(engine, draft, checked, settings)
            greedy = settings.temperature == 0
            by_k.append(report_k(count, measured.runs, baseline.runs, greedy, measured.counters))
            remarks += measured.remarks("with speculation")
        weights = None if found.folder is None else hash_weights(found.folder)
        drafts.append(DraftReport(name=found.name, kind=found.kind, sha256=weights, by_k=by_k))
    return AcceptanceReport(
        settings={**settings.model_dump(mode="json"), **chosen},
        verifier=checked.verifier,
        verifier_sha256=hash_weights(checked.verifier),
        environment=environment("client device" if checked.servers else "device"),
        servers={what: asdict(server) for what, server in checked.servers.items()},
        prompts_sha256=hash_prompts(checked.prompts),
        baseline_tokens_per_s=[tokens_per_second(records) for records in baseline.runs],
        baseline_requests=baseline.runs[0] if baseline.runs else [],
        baseline_latency=latency([record for run in baseline.runs for record in run]),
        drafts=drafts,
        remarks=remarks,
    )


@dataclass(frozen=True)
class _Measured:
    """All runs of one draft, or of the verifier alone."""

    runs: list[list[Any]]
    counters: Any
    """What a server counted meanwhile."""

    def remarks(self, what: str) -> list[str]:
        from benchmarks.acceptance import live

        return [] if self.counters is None else live.remarks(what, self.runs, self.counters)


def _run_all(engine: Any, draft: Any, checked: "_Checked", settings: AcceptanceConfig) -> _Measured:
    from benchmarks.acceptance.engines import warm_up
    from benchmarks.acceptance.records import Decoding
    from speculators_core.console import progress

    prompts = checked.prompts
    decoding = Decoding(
        settings.max_tokens, settings.temperature, settings.seed, settings.ignore_eos
    )
    what = "alone" if draft is None else f"{Path(draft.name).name}, K = {draft.speculative_tokens}"
    with engine.loaded(draft) as runner, progress(what, settings.runs * len(prompts)) as done:
        warm_up(runner, prompts, decoding)
        before = runner.counters()
        runs = [
            runner.run(prompts, replace(decoding, seed=settings.seed + run), done)
            for run in range(settings.runs)
        ]
        return _Measured(runs, None if before is None else runner.counters() - before)


def _check_options(settings: AcceptanceConfig) -> None:
    """Raises SpeculatorError for options that do not go together."""
    server = settings.server
    if settings.engine_args and settings.engine == "transformers":
        raise SpeculatorError(
            f"--engine-args are vLLM's; found {', '.join(settings.engine_args)} with "
            "--engine transformers."
        )
    if server.base_url is None:
        given = {"--baseline-url": server.baseline_url, "--api-key": server.api_key}
        for option, value in given.items():
            if value:
                raise SpeculatorError(f"{option} is of a server: it needs --base-url.")
        _check_methods(settings)
        return
    decided: dict[str, Any] = {
        "--k": settings.k,
        "--dtype": settings.dtype,
        "--engine-args": settings.engine_args,
        "--engine transformers": settings.engine == "transformers",
    }
    if found := [option for option, value in decided.items() if value]:
        raise SpeculatorError(
            f"{', '.join(found)}: the server of --base-url decides this itself, when it is started."
        )
    if len(settings.model) > 1:
        raise SpeculatorError(
            f"--base-url serves one draft, found {len(settings.model)} names in --model."
        )


def _check_methods(settings: AcceptanceConfig) -> None:
    """Raises SpeculatorError for drafts that the engine cannot run with these options."""
    on_vllm = settings.engine == "vllm"
    if "assisted" in settings.model and (on_vllm or settings.concurrency > 1):
        raise SpeculatorError(
            "assisted is Transformers' own decoding, one request at a time: use it with "
            "--engine transformers --concurrency 1."
        )
    if "prompt-lookup" in settings.model and on_vllm and len(settings.k) > 1:
        raise SpeculatorError(
            "vLLM 0.32 cannot start again in a process that ran its prompt lookup: pass one "
            f"number to --k, found {' '.join(map(str, settings.k))}."
        )


@dataclass(frozen=True)
class _Checked:
    """What a run needs, found to be whole and to fit together."""

    verifier: str
    drafts: "list[FoundDraft]"
    prompts: list[Any]
    servers: dict[str, Any] = field(default_factory=dict)


def _check_inputs(settings: AcceptanceConfig) -> _Checked:
    from benchmarks import playground
    from speculators_core.decoding.prompts import read_prompts, tokenize
    from speculators_core.verifier.reading import read_tokenizer, read_verifier_config

    source = playground.PROMPTS if settings.prompts == "playground" else settings.prompts
    prompts = read_prompts(source, settings.limit_per_category)
    find = _find_served if settings.server.base_url else _find_drafts
    named, drafts, servers = find(settings)
    verifier_config = read_verifier_config(named)
    for draft in drafts:
        draft.check(named, verifier_config)
    longest = offline.longest_text(verifier_config, settings.engine_args)
    longest = min([longest, *(server.max_model_len for server in servers.values())])
    return _Checked(named, drafts, tokenize(prompts, read_tokenizer(named), longest), servers)


def _find_drafts(settings: AcceptanceConfig) -> tuple[str, list["FoundDraft"], dict[str, Any]]:
    """The verifier, and the drafts that an engine here is to load."""
    from benchmarks import playground
    from benchmarks.acceptance.drafts import find_draft

    shipped = map(str, playground.SPECULATORS.values())
    for_vllm = settings.engine == "vllm"
    drafts = [find_draft(name, for_vllm) for name in settings.model or shipped]
    if for_vllm:  # 0.32 cannot start again in a process that ran its n-gram
        drafts.sort(key=lambda draft: draft.kind == "prompt-lookup")
    named = settings.verifier or next((d.verifier for d in drafts if d.verifier), None)
    if named is None:
        raise SpeculatorError(
            f"{', '.join(settings.model)}: no verifier is named. Pass --verifier."
        )
    return named, drafts, {}


def _find_served(settings: AcceptanceConfig) -> tuple[str, list["FoundDraft"], dict[str, Any]]:
    """The verifier, the draft, and the servers that run them."""
    from benchmarks.acceptance import live
    from benchmarks.acceptance.drafts import FoundDraft

    verifier, servers = live.find(settings.server, settings.verifier)
    server = servers["speculating"]
    name = settings.model[0] if settings.model else server.url.partition("//")[2]
    folder = Path(name) if Path(name).is_dir() else None
    return (
        verifier,
        [FoundDraft("served", name, server.speculative_tokens, folder)],
        servers,
    )


def _engine(settings: AcceptanceConfig, checked: _Checked) -> tuple[Any, dict[str, Any]]:
    """The engine, and the settings that it runs with where none were given."""
    from benchmarks.acceptance.engines import LiveEngine, TransformersEngine, VLLMEngine

    concurrency = settings.concurrency
    if checked.servers:
        server, baseline = checked.servers["speculating"], checked.servers.get("baseline")
        return LiveEngine(server, baseline, concurrency, settings.server), {"engine": "server"}
    dtype = settings.dtype or ("auto" if offline.has_gpu() else "float32")
    if settings.engine == "transformers":
        return TransformersEngine(checked.verifier, dtype, concurrency), {"dtype": dtype}
    engine_args = {**offline.default_arguments(), "seed": settings.seed, **settings.engine_args}
    engine = VLLMEngine(checked.verifier, dtype, concurrency, engine_args)
    return engine, {
        "dtype": dtype,
        "engine_args": engine_args,
        "vllm_plugins": os.environ.get("VLLM_PLUGINS"),
    }
