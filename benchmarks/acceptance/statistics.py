"""Acceptance statistics from raw counts."""

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import numpy as np
from numpy.typing import NDArray

from speculators_core.decoding.acceptance import (
    CONTEXT_BUCKETS,
    AcceptanceCounts,
    reached_and_kept,
)
from speculators_core.diagnosis.acceptance_report import Latency, RequestRecord, Summary

BOOTSTRAP_SAMPLES = 1000
LOOP_SPAN = 8
PERCENTILES = (50, 90, 99)
FEW_LOOPS = 0.1
"""Share of repeated 8-grams below which an output counts as free of loops."""


def summarize(records: Sequence[RequestRecord], speculative_tokens: int) -> Summary:
    counts = _pool(records, speculative_tokens)
    return summarize_counts(len(records), counts.num_drafts, counts.accepted_per_position)


def summarize_counts(
    num_requests: int, num_drafts: int, accepted_per_position: Sequence[int]
) -> Summary:
    """Figures of drafts that were counted together, position by position."""
    kept_to = [num_drafts, *accepted_per_position, 0]
    return Summary(
        num_requests=num_requests,
        num_drafts=num_drafts,
        accepted_per_position=list(accepted_per_position),
        acceptance_length=1 + sum(accepted_per_position) / max(1, num_drafts),
        joint_rates=[kept / max(1, num_drafts) for kept in accepted_per_position],
        conditional_rates=[
            kept / reached if reached else None
            for reached, kept in reached_and_kept(num_drafts, accepted_per_position)
        ],
        histogram=[(kept - further) / max(1, num_drafts) for kept, further in pairwise(kept_to)],
    )


def by_category(records: Sequence[RequestRecord]) -> dict[str, list[RequestRecord]]:
    groups: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        groups[record.category].append(record)
    return dict(groups)


def by_context(
    records: Sequence[RequestRecord], speculative_tokens: int
) -> dict[str, list[RequestRecord]]:
    """The requests' drafts by the number of tokens before them, ranges without drafts left out.

    A request is in each range where it has drafts, with those alone. Nothing where the order of
    some drafts is unknown.
    """
    if not all(record.is_in_order for record in records):
        return {}
    groups: dict[str, list[RequestRecord]] = {name: [] for name in CONTEXT_BUCKETS}
    for record in records:
        counts = AcceptanceCounts(speculative_tokens, record.accepted)
        for name, part in counts.by_context(record.num_prompt_tokens).items():
            groups[name].append(record.model_copy(update={"accepted": part.accepted}))
    return {name: group for name, group in groups.items() if group}


def macro_acceptance_length(records: Sequence[RequestRecord]) -> float:
    """Mean of the categories' pooled acceptance lengths."""
    groups = by_category(records).values()
    return sum(_pool(group).acceptance_length for group in groups) / max(1, len(groups))


def bootstrap_interval(runs: Sequence[Sequence[RequestRecord]]) -> tuple[float, float]:
    """95 % interval of the pooled acceptance length, resampling prompts with all their runs."""
    low, high = bootstrap_intervals(runs, speculative_tokens=0)[0]
    return low, high


def bootstrap_intervals(
    runs: Sequence[Sequence[RequestRecord]], speculative_tokens: int
) -> list[tuple[float, float]]:
    """95 % intervals of the acceptance length and of each position's joint rate."""
    rows = []
    for prompt in zip(*runs, strict=True):
        counts = _pool(prompt, speculative_tokens)
        rows.append([counts.num_drafts, sum(counts.accepted), *counts.accepted_per_position])
    drawn = _bootstrap(rows)
    rates = drawn[:, 1:] / drawn[:, :1].clip(1)
    rates[:, 0] += 1.0
    return _bounds(rates)


def speed_up_interval(
    runs: Sequence[Sequence[RequestRecord]], baseline: Sequence[Sequence[RequestRecord]]
) -> tuple[float, float] | None:
    """95 % interval of the median run's tokens/s over that without speculation, over prompts.

    None where requests overlap, whose seconds do not add up, or nothing ran without speculation.
    """
    sides = (runs, baseline)
    if not baseline or any(r.timing for side in sides for run in side for r in run):
        return None
    columns = [
        column
        for side in sides
        for run in side
        for column in ([len(r.output_ids) for r in run], [r.seconds for r in run])
    ]
    drawn = _bootstrap(list(zip(*columns, strict=True)))
    rates = drawn[:, ::2] / drawn[:, 1::2]
    ours, alone = rates[:, : len(runs)], rates[:, len(runs) :]
    return _bounds(np.median(ours, 1, keepdims=True) / np.median(alone, 1, keepdims=True))[0]


def _bootstrap(rows: Sequence[Sequence[float]], seed: int = 0) -> NDArray[np.float64]:
    """Sums of the columns over rows that are drawn with replacement, one row for each drawing."""
    table, generator = np.array(rows, dtype=np.float64), random.Random(seed)
    draws = (generator.choices(range(len(rows)), k=len(rows)) for _ in range(BOOTSTRAP_SAMPLES))
    return np.stack([table[drawn].sum(0) for drawn in draws])


def _bounds(samples: NDArray[np.float64]) -> list[tuple[float, float]]:
    """The central 95 % of each column."""
    ordered = np.sort(samples, 0)
    low, high = ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered)) - 1]
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _pool(records: Sequence[RequestRecord], speculative_tokens: int = 0) -> AcceptanceCounts:
    """The drafts of all requests; their acceptance length needs no number of positions."""
    accepted = [count for record in records for count in record.accepted]
    return AcceptanceCounts(speculative_tokens, accepted)


def tokens_per_second(records: Sequence[RequestRecord]) -> float:
    """Output tokens over the seconds from request to last token, prefill included."""
    seconds = sum(r.seconds for r in records if r.timing is None)
    timed = [(r.timing.start_s, r.timing.start_s + r.seconds) for r in records if r.timing]
    if timed:  # requests overlap: what counts is from the first sent to the last done
        seconds += max(end for _, end in timed) - min(start for start, _ in timed)
    return sum(len(r.output_ids) for r in records) / seconds


def latency(records: Sequence[RequestRecord]) -> Latency | None:
    """None where no server timed the requests one by one."""
    timed = [(record, record.timing.first_token_s) for record in records if record.timing]
    if not timed:
        return None
    after_first = [
        (record.seconds - first) / (len(record.output_ids) - 1)
        for record, first in timed
        if len(record.output_ids) > 1
    ]
    return Latency(
        first_token_s=_percentiles([first for _, first in timed]),
        per_token_s=_percentiles(after_first),
        tokens_per_s_per_user=median(len(r.output_ids) / r.seconds for r, _ in timed),
    )


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """The smallest value that so many percent do not exceed; nothing of nothing."""
    ordered = sorted(values)
    ranks = {f"p{percent}": -(-percent * len(ordered) // 100) for percent in PERCENTILES}
    return {name: ordered[rank - 1] for name, rank in ranks.items()} if ordered else {}


def without_loops(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """The requests whose output hardly repeats itself."""
    return [record for record in records if repeated_share([record]) < FEW_LOOPS]


def runs_without_loops(runs: Sequence[Sequence[RequestRecord]]) -> list[list[RequestRecord]]:
    """The runs with the drafts of requests that repeat themselves left out, and prompts that do so
    in each run.

    Each run keeps a record for each prompt that is left, so that prompts can be resampled.
    """
    kept = []
    for prompt in zip(*runs, strict=True):
        is_free = [repeated_share([record]) < FEW_LOOPS for record in prompt]
        if any(is_free):
            kept.append(
                [
                    record if free else record.model_copy(update={"accepted": []})
                    for record, free in zip(prompt, is_free, strict=True)
                ]
            )
    return [list(run) for run in zip(*kept, strict=True)]


def repeated_share(records: Sequence[RequestRecord], span: int = LOOP_SPAN) -> float:
    """Share of an output's 8-grams that it already held, over all: loops flatter a draft."""
    repeated = total = 0
    for record in records:
        seen: set[tuple[int, ...]] = set()
        for start in range(len(record.output_ids) - span + 1):
            gram = tuple(record.output_ids[start : start + span])
            repeated += gram in seen
            total += 1
            seen.add(gram)
    return repeated / max(1, total)
