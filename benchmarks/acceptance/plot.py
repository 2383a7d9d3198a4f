"""The plot of an acceptance report."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from speculators_core.diagnosis.acceptance_report import KReport


def write_plot(entries: Sequence[tuple[str, KReport]], path: Path) -> None:
    """Rates by position and the histogram of each draft that was counted, under its name."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    rates, histogram = figure.subplots(1, 2)
    counted = [(name, entry) for name, entry in entries if entry.pooled.num_drafts]
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
            label=name if entry.speed_up is None else f"{name}, {entry.speed_up:.2f}x",
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
    figure.savefig(path, format="png", dpi=150)
