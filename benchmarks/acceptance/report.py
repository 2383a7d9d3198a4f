"""An acceptance report: figures, tables and files."""

import json
from pathlib import Path
from statistics import median

from rich.table import Table

from benchmarks.acceptance.statistics import (
    FEW_LOOPS,
    bootstrap_interval,
    by_category,
    by_context,
    latency,
    macro_acceptance_length,
    repeated_share,
    summarize,
    summarize_counts,
    tokens_per_second,
    without_loops,
)
from speculators_core.console import console
from speculators_core.diagnosis.acceptance_report import (
    AcceptanceReport,
    Counters,
    KReport,
    RequestRecord,
)
from speculators_core.files import make_folder, replaced, write_text


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
    contexts = by_context(records, speculative_tokens)
    return KReport(
        speculative_tokens=speculative_tokens,
        counted="by request" if by_request else "by server",
        pooled=pooled,
        interval_95=bootstrap_interval(runs) if by_request else None,
        macro_acceptance_length=macro_acceptance_length(records) if by_request else None,
        categories={name: summarize(group, speculative_tokens) for name, group in groups.items()},
        contexts={name: summarize(group, speculative_tokens) for name, group in contexts.items()},
        tokens_per_s=rates,
        speed_up=median(rates) / median(alone_rates) if baseline else None,
        num_identical=len(runs[0]) - len(differences) if comparable else None,
        first_differences=differences,
        repeated_8_grams=repeated_share(runs[0]),
        without_loops=summarize(without_loops(records), speculative_tokens),
        latency=latency(records),
        requests=records,
        counters=counters,
    )


def _first_difference(ours: list[int], alone: list[int]) -> int:
    pairs = zip(ours, alone, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(alone)))


def print_report(report: AcceptanceReport) -> None:
    """The tables: drafts, and each by position, by category and by context length."""
    first = report.drafts[0].by_k[0]
    outputs = report.baseline_requests or first.first_run
    columns = ("draft", "K", "tau", "95 %", "macro", "loop-free", "tok/s", "speed-up", "identical")
    summary = _table("acceptance", *columns)
    positions = _table("by position", "draft", "K", "position", "kept", "joint", "conditional")
    categories = _table(
        "by category", "draft", "K", "category", "requests", "drafts", "tau", "kept"
    )
    contexts = _table("by context length", "draft", "K", "tokens", "drafts", "tau", "conditional")
    if report.baseline_tokens_per_s:
        alone = f"{median(report.baseline_tokens_per_s):.1f}"
        summary.add_row("none", *["-"] * 5, alone, "1.00x", "-")
    for name, entry in _entries(report):
        k, pooled = str(entry.speculative_tokens), entry.pooled
        same = entry.num_identical
        figures = ["-"] * 4  # nobody counted
        if pooled.num_drafts:
            figures = [
                f"{pooled.acceptance_length:.3f}",
                "{:.2f}-{:.2f}".format(*entry.interval_95) if entry.interval_95 else "-",
                _figure(entry.macro_acceptance_length, ".3f"),
                f"{entry.without_loops.acceptance_length:.3f}"
                if entry.without_loops.num_drafts
                else "-",
            ]
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
    for table in (summary, _latency_table(report), positions, categories, contexts):
        if table.row_count:
            console.print(table)
    if worst := _worst_context(report):
        console.print(worst)
    repeated = repeated_share(outputs)
    num_free = len(without_loops(outputs))
    for remark in report.remarks:
        console.print(remark)
    console.print(
        f"tau counts the bonus token. {repeated:.1%} of the verifier's 8-grams repeat; loop-free "
        f"is tau of outputs with under {FEW_LOOPS:.0%} of them ({num_free} of the verifier's)"
    )


FAR_BELOW = 0.8
"""Share of the pooled tau; a range of contexts with less is named."""
ENOUGH_DRAFTS = 50


def _worst_context(report: AcceptanceReport) -> str | None:
    """Names the draft and range of contexts furthest below the pooled tau; None if none is far."""
    lowest, line = FAR_BELOW, None
    for name, entry in _entries(report):
        tau = entry.pooled.acceptance_length
        for context, part in entry.contexts.items():
            ratio = part.acceptance_length / tau
            if part.num_drafts >= ENOUGH_DRAFTS and ratio < lowest:
                lowest = ratio
                line = (
                    f"{name}, K = {entry.speculative_tokens}: tau is {part.acceptance_length:.2f} "
                    f"with {context} tokens of context, {tau:.2f} overall"
                )
    return line


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
        (name, str(entry.speculative_tokens), entry.latency) for name, entry in _entries(report)
    ]
    for name, k, timed in rows:
        if timed is None:
            continue
        waits = [f"{1000 * s:.1f}" for s in timed.first_token_s.values()]
        steps = [f"{1000 * s:.2f}" for s in timed.per_token_s.values()] or ["-"] * len(waits)
        table.add_row(name, k, *waits, *steps, f"{timed.tokens_per_s_per_user:.1f}")
    return table


def _entries(report: AcceptanceReport) -> list[tuple[str, KReport]]:
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


def write_report(report: AcceptanceReport, folder: Path) -> None:
    """``report.json`` and ``acceptance.png``; each replaces an older one when it is whole."""
    from benchmarks.acceptance.plot import write_plot  # matplotlib takes a second

    make_folder(folder)
    with replaced(folder / "acceptance.png") as temporary:
        write_plot(_entries(report), temporary)
    text = json.dumps(report.model_dump(mode="json"), indent=1)
    write_text(folder / "report.json", text + "\n")
    console.print(f"wrote {folder / 'report.json'} and {folder / 'acceptance.png'}")
