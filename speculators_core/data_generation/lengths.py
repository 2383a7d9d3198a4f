"""Lengths of examples: mean, longest, shares of long ones."""

from collections.abc import Iterable
from typing import Self

from pydantic import Field

from speculators_core.settings import Settings

LIMITS = (512, 1024, 2048, 4096)
"""Lengths in tokens; the share of the examples that are longer is stated for each."""


class Lengths(Settings):
    """Lengths of examples in tokens, summed up; further examples can be added."""

    num_examples: int = Field(0, ge=0)
    num_tokens: int = Field(0, ge=0)
    longest: int = Field(0, ge=0)
    num_longer: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Examples longer than each of `LIMITS`."""

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Self:
        counted = list(lengths)
        return cls(
            num_examples=len(counted),
            num_tokens=sum(counted),
            longest=max(counted, default=0),
            num_longer=tuple(sum(length > limit for length in counted) for limit in LIMITS),
        )

    def __add__(self, other: "Lengths") -> "Lengths":
        pairs = zip(self.num_longer, other.num_longer, strict=True)
        return Lengths(
            num_examples=self.num_examples + other.num_examples,
            num_tokens=self.num_tokens + other.num_tokens,
            longest=max(self.longest, other.longest),
            num_longer=tuple(ours + theirs for ours, theirs in pairs),
        )

    @property
    def mean(self) -> float:
        return self.num_tokens / max(self.num_examples, 1)

    def describe_longer(self) -> str:
        """The share of the longer examples, up to the first limit that none exceeds.

        ``61% longer than 512 tokens, 0.4% than 1,024, none than 2,048``
        """
        parts = []
        for limit, count in zip(LIMITS, self.num_longer, strict=True):
            parts.append(f"{_percent(count / max(self.num_examples, 1))} than {limit:,}")
            if not count:
                break
        first, *others = parts
        return ", ".join([f"{first.replace(' than', ' longer than')} tokens", *others])


def _percent(share: float) -> str:
    if share == 0:
        return "none"
    if share < 0.0005:
        return "under 0.1%"
    return f"{share:.1%}".replace(".0%", "%")
