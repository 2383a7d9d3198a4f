"""Acceptance statistics from raw counts: each name as the README defines it."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

BOOTSTRAP_SAMPLES = 1000
LOOP_SPAN = 8
FEW_LOOPS = 0.1
"""Share of repeated 8-grams below which an output counts as free of loops."""


class RequestRecord(BaseModel):
    """What one request did: enough to recompute every figure."""

    model_config = ConfigDict(frozen=True)
    category: str
    num_prompt_tokens: int
    output_ids: list[int]
    accepted: list[int]
    """Tokens kept of each draft, in order; empty without speculation."""
    seconds: float


class Summary(BaseModel):
    """Figures of some requests at one number of speculative tokens."""

    model_config = ConfigDict(frozen=True)
    num_requests: int
    num_drafts: int
    accepted_per_position: list[int]
    acceptance_length: float
    """1 + accepted / drafts over all requests (pooled)."""
    joint_rates: list[float]
    """Share of drafts whose positions 1 to k were all kept."""
    conditional_rates: list[float | None]
    """Share kept at k of the drafts kept up to k - 1; None where there were none."""
    histogram: list[float]
    """Share of drafts with 0, 1, ... K tokens kept."""


def summarize(records: Sequence[RequestRecord], speculative_tokens: int) -> Summary:
    accepted = [count for record in records for count in record.accepted]
    drafts = len(accepted)
    positions = range(1, speculative_tokens + 1)
    per_position = [sum(count >= k for count in accepted) for k in positions]
    reached = [drafts, *per_position[:-1]]
    return Summary(
        num_requests=len(records),
        num_drafts=drafts,
        accepted_per_position=per_position,
        acceptance_length=1.0 + sum(accepted) / max(1, drafts),
        joint_rates=[kept / max(1, drafts) for kept in per_position],
        conditional_rates=[
            kept / before if before else None
            for kept, before in zip(per_position, reached, strict=True)
        ],
        histogram=[
            sum(count == k for count in accepted) / max(1, drafts)
            for k in range(speculative_tokens + 1)
        ],
    )


def by_category(records: Sequence[RequestRecord]) -> dict[str, list[RequestRecord]]:
    groups: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        groups[record.category].append(record)
    return dict(groups)


def macro_acceptance_length(records: Sequence[RequestRecord]) -> float:
    """Mean of the categories' pooled acceptance lengths."""
    groups = by_category(records).values()
    return sum(_pooled(group) for group in groups) / max(1, len(groups))


def bootstrap_interval(
    runs: Sequence[Sequence[RequestRecord]], seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the pooled acceptance length, resampling prompts with all their runs."""
    generator = random.Random(seed)
    prompts = list(zip(*runs, strict=True))
    lengths = sorted(
        _pooled([record for prompt in drawn for record in prompt])
        for drawn in (generator.choices(prompts, k=len(prompts)) for _ in range(BOOTSTRAP_SAMPLES))
    )
    return lengths[int(0.025 * BOOTSTRAP_SAMPLES)], lengths[int(0.975 * BOOTSTRAP_SAMPLES) - 1]


def _pooled(records: Sequence[RequestRecord]) -> float:
    drafts = sum(len(record.accepted) for record in records)
    return 1.0 + sum(sum(record.accepted) for record in records) / max(1, drafts)


def tokens_per_second(records: Sequence[RequestRecord]) -> float:
    """Output tokens over the seconds from request to last token, prefill included."""
    return sum(len(r.output_ids) for r in records) / sum(r.seconds for r in records)


def without_loops(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """The requests whose output hardly repeats itself."""
    return [record for record in records if repeated_share([record]) < FEW_LOOPS]


def repeated_share(records: Sequence[RequestRecord], span: int = LOOP_SPAN) -> float:
    """Share of an output's 8-grams that it already held, over all: loops flatter a draft."""
    repeated = total = 0
    for record in records:
        seen: set[Any] = set()
        for start in range(len(record.output_ids) - span + 1):
            gram = tuple(record.output_ids[start : start + span])
            repeated += gram in seen
            total += 1
            seen.add(gram)
    return repeated / max(1, total)
