"""An acceptance report: figures, tables and files."""

import json
from pathlib import Path
from statistics import median

from pydantic import ValidationError
from rich.table import Table

from benchmarks.acceptance.statistics import (
    FEW_LOOPS,
    bootstrap_interval,
    by_category,
    by_context,
    latency,
    macro_acceptance_length,
    repeated_share,
    runs_without_loops,
    speed_up_interval,
    summarize,
    summarize_counts,
    tokens_per_second,
    without_loops,
)
from speculators_core.console import console
from speculators_core.decoding.acceptance import worst_cell
from speculators_core.diagnosis.acceptance_report import (
    AcceptanceReport,
    Counters,
    KReport,
    RequestRecord,
    Summary,
)
from speculators_core.errors import SpeculatorError, first_fault
from speculators_core.files import make_folder, read_json, replaced, write_text


def report_k(
    speculative_tokens: int,
    runs: list[list[RequestRecord]],
    baseline: list[list[RequestRecord]],
    greedy: bool,
    counters: Counters | None = None,
) -> KReport:
    """Counts of all runs together, speed as the median of runs, outputs of the first run.

    ``baseline`` is empty where nothing ran without speculation.
    """
    records = [record for run in runs for record in run]
    rates = [tokens_per_second(run) for run in runs]
    alone_rates = [tokens_per_second(run) for run in baseline]
    comparable = greedy and bool(baseline)
    differences = (
        {
            index: _first_difference(ours.output_ids, alone.output_ids)
            for index, (ours, alone) in enumerate(zip(runs[0], baseline[0], strict=True))
            if ours.output_ids != alone.output_ids
        }
        if comparable
        else {}
    )
    pooled = summarize(records, speculative_tokens)
    by_request = not counters or pooled.num_drafts > 0
    if counters and not by_request:
        pooled = summarize_counts(len(records), counters.num_drafts, counters.accepted_per_position)
    groups = by_category(records) if by_request else {}
    free_runs = runs_without_loops(runs) if by_request else []
    free = without_loops(records)
    return KReport(
        speculative_tokens=speculative_tokens,
        counted="by request" if by_request else "by server",
        pooled=pooled,
        interval_95=bootstrap_interval(runs) if by_request else None,
        macro_acceptance_length=macro_acceptance_length(records) if by_request else None,
        categories={name: summarize(group, speculative_tokens) for name, group in groups.items()},
        contexts=_contexts(records, speculative_tokens),
        tokens_per_s=rates,
        speed_up=median(rates) / median(alone_rates) if baseline else None,
        speed_up_interval_95=speed_up_interval(runs, baseline),
        num_identical=len(runs[0]) - len(differences) if comparable else None,
        first_differences=differences,
        repeated_8_grams=repeated_share(runs[0]),
        without_loops=summarize(free, speculative_tokens),
        without_loops_interval_95=bootstrap_interval(free_runs) if free_runs else None,
        without_loops_contexts=_contexts(free, speculative_tokens),
        latency=latency(records),
        requests=records,
        counters=counters,
    )


def _contexts(records: list[RequestRecord], speculative_tokens: int) -> dict[str, Summary]:
    groups = by_context(records, speculative_tokens)
    return {name: summarize(group, speculative_tokens) for name, group in groups.items()}


def _first_difference(ours: list[int], alone: list[int]) -> int:
    pairs = zip(ours, alone, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(alone)))


def print_report(report: AcceptanceReport) -> None:
    """The worst cells, then the tables: drafts, and each by position, category and context.

    Where much of the text repeats itself, the first figure of a draft is its loop-free tau.
    """
    outputs = _outputs(report)
    repeated, has_loops = repeated_share(outputs), repeats_itself(report)
    figures_of = _loop_free_first if has_loops else _pooled_first
    taus = ("loop-free tau", "95 %", "pooled", "macro")
    columns = taus if has_loops else ("tau", "95 %", "macro", "loop-free")
    summary = _table("acceptance", "draft", "K", *columns, "tok/s", "speed-up", "identical")
    positions = _table("by position", "draft", "K", "position", "kept", "joint", "conditional")
    categories = _table(
        "by category", "draft", "K", "category", "requests", "drafts", "tau", "kept"
    )
    contexts = _table("by context length", "draft", "K", "tokens", "drafts", "tau", "conditional")
    if report.baseline_tokens_per_s:
        alone = f"{median(report.baseline_tokens_per_s):.1f}"
        summary.add_row("none", *["-"] * 5, alone, "1.00x", "-")
    for name, entry in entries(report):
        k, pooled = str(entry.speculative_tokens), entry.pooled
        same = entry.num_identical
        figures = figures_of(entry) if pooled.num_drafts else ["-"] * 4  # nobody counted
        summary.add_row(
            name,
            k,
            *figures,
            f"{median(entry.tokens_per_s):.1f}",
            _figure(entry.speed_up, ".2f", "x"),
            "-" if same is None else f"{same} of {len(outputs)}",
        )
        if not pooled.num_drafts:
            continue
        rates = zip(
            pooled.accepted_per_position, pooled.joint_rates, pooled.conditional_rates, strict=True
        )
        for position, (kept, joint, conditional) in enumerate(rates, 1):
            rate = _figure(conditional, ".3f")
            positions.add_row(name, k, str(position), str(kept), f"{joint:.3f}", rate)
        for category, group in entry.categories.items():
            kept_of_group = " ".join(map(str, group.accepted_per_position))
            tau = f"{group.acceptance_length:.3f}"
            numbers = (str(group.num_requests), str(group.num_drafts), tau)
            categories.add_row(name, k, category, *numbers, kept_of_group)
        for context, part in entry.contexts.items():
            tau = f"{part.acceptance_length:.3f}"
            conditionals = " ".join(_figure(rate, ".2f") for rate in part.conditional_rates)
            contexts.add_row(name, k, context, str(part.num_drafts), tau, conditionals)
    for name, entry in entries(report):
        if worst := worst_cell({c: part.reached_and_kept for c, part in entry.contexts.items()}):
            console.print(f"{name}, K = {entry.speculative_tokens}: worst at {worst}")
    for table in (summary, _latency_table(report), positions, categories, contexts):
        if table.row_count:
            console.print(table)
    for remark in report.remarks:
        console.print(remark)
    num_free = len(without_loops(outputs))
    console.print(
        f"tau counts the bonus token. {repeated:.1%} of the verifier's 8-grams repeat"
        f"{', which flatters the pooled tau' if has_loops else ''}; loop-free is tau of outputs "
        f"with under {FEW_LOOPS:.0%} of them ({num_free} of the verifier's {len(outputs)})"
    )


def repeats_itself(report: AcceptanceReport) -> bool:
    """Whether so much of the verifier's text repeats itself that the loop-free tau comes first."""
    return repeated_share(_outputs(report)) >= FEW_LOOPS


def _outputs(report: AcceptanceReport) -> list[RequestRecord]:
    """What the verifier wrote; with the first draft where nothing ran without speculation."""
    return report.baseline_requests or report.drafts[0].by_k[0].first_run


def _pooled_first(entry: KReport) -> list[str]:
    return [
        f"{entry.pooled.acceptance_length:.3f}",
        _interval(entry.interval_95),
        _figure(entry.macro_acceptance_length, ".3f"),
        _loop_free(entry),
    ]


def _loop_free_first(entry: KReport) -> list[str]:
    return [
        _loop_free(entry),
        _interval(entry.without_loops_interval_95),
        f"{entry.pooled.acceptance_length:.3f}",
        _figure(entry.macro_acceptance_length, ".3f"),
    ]


def _loop_free(entry: KReport) -> str:
    free = entry.without_loops
    return f"{free.acceptance_length:.3f}" if free.num_drafts else "-"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "{:.2f}-{:.2f}".format(*bounds) if bounds else "-"


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _latency_table(report: AcceptanceReport) -> Table:
    """When tokens came, of a server; no rows where none was asked."""
    table = _table(
        f"latency, {report.settings['concurrency']} requests at a time",
        "draft",
        "K",
        "TTFT ms p50",
        "p90",
        "p99",
        "TPOT ms p50",
        "p90",
        "p99",
        "tok/s/user",
    )
    rows = [("none", "-", report.baseline_latency)]
    rows += [
        (name, str(entry.speculative_tokens), entry.latency) for name, entry in entries(report)
    ]
    for name, k, timed in rows:
        if timed is None:
            continue
        waits = [f"{1000 * s:.1f}" for s in timed.first_token_s.values()]
        steps = [f"{1000 * s:.2f}" for s in timed.per_token_s.values()] or ["-"] * len(waits)
        table.add_row(name, k, *waits, *steps, f"{timed.tokens_per_s_per_user:.1f}")
    return table


def entries(report: AcceptanceReport) -> list[tuple[str, KReport]]:
    """Each draft at each number of speculative tokens, under a name that fits a table."""
    short = [draft.short_name for draft in report.drafts]
    return [
        (name if short.count(name) == 1 else draft.name, entry)
        for name, draft in zip(short, report.drafts, strict=True)
        for entry in draft.by_k
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def read_report(path: Path) -> AcceptanceReport:
    """A report that `write_report` wrote.

    Raises:
        SpeculatorError: it cannot be read, or is not such a report.
    """
    try:
        return AcceptanceReport.model_validate(read_json(path, "a report"))
    except ValidationError as error:
        raise SpeculatorError(
            f"{path}: not a report of `speculators acceptance`: {first_fault(error)}. Name a "
            "report.json that the command wrote with --output."
        ) from error


def write_report(report: AcceptanceReport, folder: Path) -> None:
    """``report.json`` and the plots; each replaces an older one when it is whole."""
    make_folder(folder)
    text = json.dumps(report.model_dump(mode="json"), indent=1)
    write_text(folder / "report.json", text + "\n")
    console.print(f"wrote {folder / 'report.json'}")
    write_plots(report, folder)


def write_plots(report: AcceptanceReport, folder: Path) -> None:
    """``acceptance.png`` for light backgrounds and ``acceptance-dark.png`` for dark ones."""
    from benchmarks.acceptance.plot import write_plot  # matplotlib takes a second

    make_folder(folder)
    for name, is_dark in (("acceptance.png", False), ("acceptance-dark.png", True)):
        with replaced(folder / name) as temporary:
            write_plot(report, entries(report), temporary, is_dark)
    console.print(f"wrote {folder / 'acceptance.png'} and acceptance-dark.png")
