"""Acceptance statistics from raw counts: each name as the README defines it."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from speculators_core.generation import AcceptanceCounts

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
    counts = _pool(records, speculative_tokens)
    drafts, per_position = counts.num_drafts, counts.accepted_per_position
    reached = [drafts, *per_position[:-1]]
    return Summary(
        num_requests=len(records),
        num_drafts=drafts,
        accepted_per_position=per_position,
        acceptance_length=counts.acceptance_length,
        joint_rates=[kept / max(1, drafts) for kept in per_position],
        conditional_rates=[
            kept / before if before else None
            for kept, before in zip(per_position, reached, strict=True)
        ],
        histogram=[
            counts.accepted.count(k) / max(1, drafts) for k in range(speculative_tokens + 1)
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
    return sum(_pool(group).acceptance_length for group in groups) / max(1, len(groups))


def bootstrap_interval(
    runs: Sequence[Sequence[RequestRecord]], seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the pooled acceptance length, resampling prompts with all their runs."""
    generator = random.Random(seed)
    prompts = list(zip(*runs, strict=True))
    lengths = sorted(
        _pool([record for prompt in drawn for record in prompt]).acceptance_length
        for drawn in (generator.choices(prompts, k=len(prompts)) for _ in range(BOOTSTRAP_SAMPLES))
    )
    return lengths[int(0.025 * BOOTSTRAP_SAMPLES)], lengths[int(0.975 * BOOTSTRAP_SAMPLES) - 1]


def _pool(records: Sequence[RequestRecord], speculative_tokens: int = 0) -> "AcceptanceCounts":
    """The drafts of all requests; their acceptance length needs no number of positions."""
    from speculators_core.generation import AcceptanceCounts  # here: it brings torch

    accepted = [count for record in records for count in record.accepted]
    return AcceptanceCounts(speculative_tokens, accepted)


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
