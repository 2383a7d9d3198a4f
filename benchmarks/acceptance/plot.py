"""The plot of an acceptance report, for a slide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from benchmarks.acceptance.statistics import (
    bootstrap_intervals,
    repeated_share,
    runs_without_loops,
    without_loops,
)
from speculators_core.decoding.acceptance import CONTEXT_BUCKETS, ENOUGH_DRAFTS
from speculators_core.diagnosis.acceptance_report import (
    AcceptanceReport,
    KReport,
    RequestRecord,
    Summary,
)

INCHES, DPI = (8.0, 3.5), 200
"""1,600 pixels wide: sharp at 800 on a screen with two pixels to one."""
MARKERS = "osD^vP"
GAP, LABEL_PIXELS = 14, 30
"""Pixels between a line and its label, and between labels that stand in a column."""
TITLE_WIDTH = 27
"""Characters in a line of a panel's title."""
FEWEST_DRAWN = 20
"""Drafts in a range of contexts; a mark is hollow below `ENOUGH_DRAFTS`."""
LONGEST_NAME = 14
"""Characters of a draft's name; the start of a longer one is left out."""
MATERIAL = 0.05
"""Share of tau by which it changes with the context before a title says so."""


@dataclass(frozen=True)
class Theme:
    """Colours; those of the drafts are told apart by colour-blind readers (Okabe and Ito)."""

    background: str
    text: str
    faint: str
    drafts: tuple[str, ...]


LIGHT = Theme(
    "#ffffff",
    "#1f2328",
    "#6e7781",
    ("#0072b2", "#d55e00", "#009e73", "#b0528c", "#3a9ad9", "#b07a00"),
)
DARK = Theme(
    "#0d1117",
    "#e6edf3",
    "#8b949e",
    ("#56b4e9", "#f5873a", "#2fc597", "#e59ac5", "#9fd3f5", "#f0c04a"),
)


@dataclass(frozen=True)
class Line:
    """What is drawn of a draft, at the K at which it is fastest."""

    label: str
    color: str
    marker: str
    entry: KReport
    figures: Summary
    contexts: dict[str, Summary]
    bands: list[tuple[float, float]]
    """95 % intervals of each position's joint rate; empty where requests are not known."""


Labelled = tuple[Line, Sequence[tuple[float, float]], str]
"""A line with its points and its label."""


def write_plot(
    report: AcceptanceReport,
    entries: Sequence[tuple[str, KReport]],
    path: Path,
    is_dark: bool = False,
) -> None:
    """Speed-up, tokens kept by position, and tau by context length, of each draft at its best K.

    Where much of the verifier's text repeats itself, tokens kept and tau are those of the outputs
    that do not, if there are any. ``entries`` are those of the report under their short names.
    """
    theme = DARK if is_dark else LIGHT
    outputs = report.baseline_requests or entries[0][1].first_run
    is_free = repeated_share(outputs) >= 0.1 and any(
        entry.without_loops.num_drafts for _, entry in entries
    )
    lines = _lines(entries, theme, is_free)
    figure = Figure(figsize=INCHES, dpi=DPI, facecolor=theme.background)
    FigureCanvasAgg(figure)
    speed, kept, contexts = figure.subplots(1, 3, width_ratios=(0.85, 1.1, 1.0))
    figure.subplots_adjust(left=0.03, right=0.985, top=0.83, bottom=0.2, wspace=0.3)
    for axes in (speed, kept, contexts):
        _style(axes, theme)
    _draw_speed(speed, lines, theme)
    counted = [line for line in lines if line.figures.num_drafts]
    _draw_kept(kept, counted, theme)
    _draw_contexts(contexts, counted, theme)
    figure.text(
        0.015, 0.02, _footnote(report, outputs, lines, is_free), color=theme.faint, fontsize=7
    )
    figure.savefig(path, format="png", dpi=DPI, facecolor=theme.background)


def _lines(entries: Sequence[tuple[str, KReport]], theme: Theme, is_free: bool) -> list[Line]:
    best: dict[str, KReport] = {}
    for name, entry in entries:
        if name not in best or _worth(entry) > _worth(best[name]):
            best[name] = entry
    lines = []
    for number, (name, entry) in enumerate(best.items()):
        num_runs = len(entry.tokens_per_s)
        size = len(entry.requests) // num_runs
        runs = [entry.requests[size * run : size * (run + 1)] for run in range(num_runs)]
        drawn = runs_without_loops(runs) if is_free else runs
        is_known = entry.counted == "by request" and bool(drawn)
        bands = bootstrap_intervals(drawn, entry.speculative_tokens)[1:] if is_known else []
        lines.append(
            Line(
                label=name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}",
                color=theme.drafts[number % len(theme.drafts)],
                marker=MARKERS[number % len(MARKERS)],
                entry=entry,
                figures=entry.without_loops if is_free else entry.pooled,
                contexts=entry.without_loops_contexts if is_free else entry.contexts,
                bands=bands,
            )
        )
    return lines


def _worth(entry: KReport) -> tuple[float, float]:
    return entry.speed_up or 0.0, entry.pooled.acceptance_length


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.faint)
    axes.tick_params(colors=theme.faint, labelsize=8, length=3)
    axes.xaxis.label.set(color=theme.faint, fontsize=8)


def _title(axes: Axes, theme: Theme, seen: str, what: str) -> None:
    """What is seen, in bold, over what is drawn."""
    for text, height, color, weight, size in (
        (fill(seen, TITLE_WIDTH), 1.105, theme.text, "bold", 10),
        (what, 1.035, theme.faint, "normal", 7.5),
    ):
        axes.text(
            0.0, height, text, transform=axes.transAxes, color=color, weight=weight, fontsize=size
        )


# ---- speed-up ----


def _draw_speed(axes: Axes, lines: Sequence[Line], theme: Theme) -> None:
    axes.spines["left"].set_visible(False)
    timed = [(line, line.entry.speed_up) for line in lines if line.entry.speed_up is not None]
    what = "output tokens/s over none; 95 %"
    if not timed:
        _title(axes, theme, "Speed-up not measured", "nothing ran without speculation")
        axes.set_axis_off()
        return
    farthest = 1.0
    for row, (line, ratio) in enumerate(timed):
        low, high = line.entry.speed_up_interval_95 or (ratio, ratio)
        axes.plot([low, high], [row, row], color=line.color, linewidth=2.2, alpha=0.55)
        axes.plot(ratio, row, line.marker, color=line.color, markersize=7)
        name = f"{line.label}, K = {line.entry.speculative_tokens}"
        axes.annotate(
            f"{name}  {ratio:.2f}x",
            (min(low, ratio), row),
            xytext=(0, 8),
            textcoords="offset points",
            color=line.color,
            fontsize=8,
            weight="bold",
        )
        farthest = max(farthest, high)
    axes.axvline(1.0, color=theme.faint, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(1.0, len(timed) - 0.35, " none", color=theme.faint, fontsize=8, va="center")
    axes.set(ylim=(len(timed) - 0.1, -0.75), yticks=[], xlabel="speed-up")
    left = min([1.0, *axes.get_xlim()])
    axes.set_xlim(left - 0.03, max(farthest, left + 1.25 * (farthest - left)))
    fastest, ratio = max(timed, key=lambda pair: pair[1])
    seen = f"{fastest.label}: {ratio:.1f} times as fast"
    _title(axes, theme, seen if ratio > 1.0 else "No draft is faster than none", what)


# ---- tokens kept ----


def _draw_kept(axes: Axes, lines: Sequence[Line], theme: Theme) -> None:
    for line in lines:
        positions = range(1, line.entry.speculative_tokens + 1)
        if line.bands:
            low, high = zip(*line.bands, strict=True)
            axes.fill_between(positions, low, high, color=line.color, alpha=0.16, linewidth=0)
        axes.plot(positions, line.figures.joint_rates, color=line.color, linewidth=1.8)
        axes.plot(positions, line.figures.joint_rates, line.marker, color=line.color, markersize=4)
    most = max((line.entry.speculative_tokens for line in lines), default=1)
    axes.set(xlim=(0.8, 1.2 * most + 0.2), ylim=(0, 1), xlabel="position in the draft")
    axes.set_xticks(range(1, most + 1, 1 + most // 10))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    ends: list[Labelled] = [
        (line, list(enumerate(line.figures.joint_rates, start=1)), line.label) for line in lines
    ]
    _label(axes, ends, theme)
    lengths = {line.label: line.figures.acceptance_length - 1 for line in lines}
    what = "drafts that keep all tokens up to here; 95 %"
    if not lengths:
        _title(axes, theme, "Tokens kept are not known", what)
        return
    best = max(lengths, key=lambda name: lengths[name])
    least = min(lengths, key=lambda name: lengths[name])
    seen = f"{best} keeps {lengths[best]:.1f} tokens of a draft"
    if best != least:
        seen = f"{best} keeps {lengths[best]:.1f} tokens of a draft, {least} {lengths[least]:.1f}"
    _title(axes, theme, seen, what)


# ---- context length ----


def _draw_contexts(axes: Axes, lines: Sequence[Line], theme: Theme) -> None:
    drawn = {
        line.label: {
            name: part for name, part in line.contexts.items() if part.num_drafts >= FEWEST_DRAWN
        }
        for line in lines
    }
    names = [name for name in CONTEXT_BUCKETS if any(name in parts for parts in drawn.values())]
    what = "tokens per verifier step (tau)"
    if not names:
        _title(axes, theme, "Context lengths are not known", what)
        axes.set_axis_off()
        return
    paths: list[Labelled] = []
    for line in lines:
        parts = drawn[line.label]
        points = [(names.index(name), p.acceptance_length) for name, p in parts.items()]
        axes.plot(*zip(*points, strict=True), color=line.color, linewidth=1.8) if points else None
        for (x, tau), part in zip(points, parts.values(), strict=True):
            is_solid = part.num_drafts >= ENOUGH_DRAFTS
            face = line.color if is_solid else theme.background
            axes.plot(x, tau, line.marker, color=line.color, markerfacecolor=face, markersize=5)
        if points:
            paths.append((line, [*points], f"{line.label} {points[-1][1]:.2f}"))
    highest = max(tau for _, points, _ in paths for _, tau in points)
    axes.set(ylim=(1, 1 + 1.12 * (highest - 1)), xlim=(-0.25, _right_end(axes, paths, len(names))))
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("tokens of context")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _label_ends(axes, paths)
    is_hollow = any(
        p.num_drafts < ENOUGH_DRAFTS for parts in drawn.values() for p in parts.values()
    )
    hollow = "; hollow: few" if is_hollow else ""
    _title(axes, theme, _what_contexts_show(drawn), what + hollow)


def _what_contexts_show(drawn: dict[str, dict[str, Summary]]) -> str:
    """The largest change of a draft from its shortest to its longest contexts."""
    changes = {}
    for label, parts in drawn.items():
        lengths = [p.acceptance_length for p in parts.values() if p.num_drafts >= ENOUGH_DRAFTS]
        if len(lengths) > 1:
            changes[label] = lengths[-1] / lengths[0] - 1
    if not changes:
        return "Contexts of one range alone"
    label = max(changes, key=lambda name: abs(changes[name]))
    change = changes[label]
    if abs(change) < MATERIAL:
        return "tau holds as the context grows"
    if all(other < -MATERIAL for other in changes.values()) and len(changes) > 1:
        return f"Long contexts cost every draft, {label} most ({change:+.0%})"
    return f"{label} {'loses' if change < 0 else 'gains'} {abs(change):.0%} in long contexts"


# ---- pieces ----


def _right_end(axes: Axes, lines: Sequence[Labelled], num_ranges: int) -> float:
    """The right limit of x with which labels fit after the last range, at ``num_ranges - 1``."""
    texts = [axes.text(0, 0, text, fontsize=8, weight="bold") for _, _, text in lines]
    widest = max(text.get_window_extent().width for text in texts)
    for text in texts:
        text.remove()
    share = min(0.7, (widest + 2 * GAP) / axes.get_window_extent().width)
    return (num_ranges - 1 + 0.25 * share) / (1 - share)


def _label_ends(axes: Axes, lines: Sequence[Labelled]) -> None:
    """Puts each text to the right of its line's end, moved up where it would cover another."""
    step = axes.transData.inverted().transform([(0, 0), (0, LABEL_PIXELS)])
    least_gap = step[1][1] - step[0][1]
    lowest = -np.inf
    for line, points, text in sorted(lines, key=lambda labelled: labelled[1][-1][1]):
        x, y = points[-1]
        lowest = max(y, lowest + least_gap)
        axes.annotate(
            text,
            (x, lowest),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=line.color,
            fontsize=8,
            weight="bold",
        )


def _label(axes: Axes, lines: Sequence[Labelled], theme: Theme) -> None:
    """Puts each text beside its line, where it is nearest to that line and covers the least."""
    paths = [_dense(axes.transData.transform(points)) for _, points, _ in lines]
    taken: list[Bbox] = []
    frame = axes.get_window_extent().padded(-GAP / 2)
    for number, (line, _, text) in enumerate(lines):
        shown = axes.text(0, 0, text, color=line.color, fontsize=8, weight="bold")
        shown.set_path_effects([withStroke(linewidth=2.5, foreground=theme.background)])
        size = shown.get_window_extent()
        places = [box for x, y in paths[number] for box in _beside(x, y, size)]
        costs = [
            _cost(box, paths, number, taken, frame) + at / 1000 for at, box in enumerate(places)
        ]
        box = places[int(np.argmin(costs))]
        x, y = axes.transData.inverted().transform((box.x0, box.y0)).tolist()
        shown.set_position((x, y))
        taken.append(shown.get_window_extent())


def _dense(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points of a line and between them, its end first."""
    at = np.linspace(len(path) - 1, 0, 12 * (len(path) - 1) + 1)
    return np.stack([np.interp(at, np.arange(len(path)), column) for column in path.T], axis=1)


def _cost(
    box: Bbox,
    paths: Sequence[NDArray[np.float64]],
    own: int,
    taken: Sequence[Bbox],
    frame: Bbox,
) -> float:
    """What a label costs there: covered lines and texts, a foreign line nearer than its own."""
    padded = box.padded(3)
    is_outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
    covered = sum(bool(padded.count_contains(path)) for path in paths)
    overlapped = sum(padded.overlaps(other) for other in taken)
    near = [_distance(box, path) for path in paths]
    others = min(near[:own] + near[own + 1 :], default=np.inf)
    confusion = max(0.0, 1.3 * near[own] - others) / GAP
    return 100.0 * is_outside + 20.0 * overlapped + 10.0 * covered + confusion + near[own] / 100


def _distance(box: Bbox, path: NDArray[np.float64]) -> float:
    """Pixels from a box to the nearest point of a line."""
    outside = np.maximum(np.maximum(box.min - path, path - box.max), 0.0)
    return float(np.hypot(*outside.T).min())


def _beside(x: float, y: float, size: Bbox) -> Iterator[Bbox]:
    """Places for a text of this size around a point, the one to its right first."""
    above, below, half = GAP, -GAP - size.height, -size.width / 2
    for dx, dy in (
        (GAP, -size.height / 2),
        (half, above),
        (half, below),
        (GAP, above),
        (GAP, below),
        (-GAP - size.width, above),
        (-GAP - size.width, below),
    ):
        yield Bbox.from_bounds(x + dx, y + dy, size.width, size.height)


def _footnote(
    report: AcceptanceReport,
    outputs: Sequence[RequestRecord],
    lines: Sequence[Line],
    is_free: bool,
) -> str:
    temperature = report.settings.get("temperature", 0)
    drawn = f"temperature {temperature:g}" if temperature else "greedy"
    told = f"Model {Path(report.verifier).name}, {len(outputs)} prompts, {drawn}."
    if is_free:
        told += (
            f" {repeated_share(outputs):.0%} of its text repeats itself: tokens kept and tau are "
            f"of the {len(without_loops(outputs))} outputs that do not."
        )
    return told
