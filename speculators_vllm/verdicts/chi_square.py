"""A test that drawn continuations follow a known law.

The joint law of a continuation is a product of one-token laws, so it holds if the next token's law
holds after every prefix. After each prefix that was drawn often enough, the next tokens are
compared with the law there:

    drawn    a b c     prefix a      4 draws, next b b b d    law b .7, d .2, others .1
             a b e     prefix a b    3 draws, next c e c      law c .5, e .4, others .1
             a b c     prefix a d    1 draw: too few
             a d f     prefix -      the first token, which no draft touches

Given the prefixes the counts are multinomial and independent of each other: chi-squares add up. A
token has its own cell if 5 draws are expected of it, and so have all others together. If fewer are
expected of the others, their counts are added up over all prefixes and compared with a Poisson law,
so that a token to which the law gives almost no probability is noticed after any prefix.

A known law costs one short request a prefix and has no randomness: a test against a second set of
draws needs twice as many draws on each side for the same power.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import BaseModel, computed_field

MIN_EXPECTED = 5.0
MIN_DRAWS = 2 * int(MIN_EXPECTED)
"""With fewer draws there are no two cells."""
ROUNDING = 1e-6
"""Remainder of float32 probabilities that should add up to one."""

Law = Mapping[int, float]
"""Probabilities of the likeliest tokens; all others share the rest."""


class PrefixCounts(BaseModel):
    """Counts of the tokens after one prefix, and the counts that the law expects."""

    prefix: list[int]
    token_ids: list[int]
    """Tokens with their own cell."""
    counts: list[int]
    """Draws of each of these tokens, and at the end of all others."""
    expected: list[float]

    @property
    def has_cell_of_others(self) -> bool:
        return self.expected[-1] >= MIN_EXPECTED

    @property
    def chi_square(self) -> float:
        """Chi-square over the cells; without one for the others their draws are left out."""
        cells = len(self.counts) if self.has_cell_of_others else len(self.token_ids)
        counts, expected = self.counts[:cells], self.expected[:cells]
        if cells < 2:
            return 0.0
        scale = sum(counts) / sum(expected)
        pairs = zip(counts, expected, strict=True)
        return sum((n - e * scale) ** 2 / (e * scale) for n, e in pairs) if scale else 0.0

    @property
    def degrees(self) -> int:
        return max(len(self.token_ids) + self.has_cell_of_others - 1, 0)


class LawTest(BaseModel):
    """The draws of one prompt against the law."""

    prompt: int
    num_draws: int
    prefixes: list[PrefixCounts]

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def degrees(self) -> int:
        return sum(prefix.degrees for prefix in self.prefixes)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def chi_square(self) -> float:
        return sum(prefix.chi_square for prefix in self.prefixes)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_rare(self) -> int:
        """Draws of tokens for which the law expects too few for a cell."""
        return sum(p.counts[-1] for p in self.prefixes if not p.has_cell_of_others)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def expected_rare(self) -> float:
        return sum(p.expected[-1] for p in self.prefixes if not p.has_cell_of_others)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p_value(self) -> float:
        """Probability of counts as far from the law as these, or further, if it holds."""
        rare = poisson_tail(self.num_rare, self.expected_rare)
        if self.degrees == 0:
            return rare
        return combine([chi_square_tail(self.chi_square, self.degrees), rare])


def count_prefixes(draws: Iterable[Sequence[int]]) -> dict[tuple[int, ...], Counter[int]]:
    """Next tokens after every prefix of at least one token that was drawn often enough."""
    followed: dict[tuple[int, ...], Counter[int]] = {}
    for tokens in draws:
        for length in range(1, len(tokens)):
            prefix = tuple(tokens[:length])
            followed.setdefault(prefix, Counter())[tokens[length]] += 1
    return {prefix: nexts for prefix, nexts in followed.items() if nexts.total() >= MIN_DRAWS}


def compare(
    prompt: int, draws: Sequence[Sequence[int]], laws: Mapping[tuple[int, ...], Law]
) -> LawTest:
    """Counts of the draws beside the counts that the law after each prefix expects.

    A law names at least the tokens of which 5 draws are expected.
    """
    return LawTest(
        prompt=prompt,
        num_draws=len(draws),
        prefixes=[
            _compare_prefix(prefix, nexts, laws[prefix])
            for prefix, nexts in count_prefixes(draws).items()
        ],
    )


def _compare_prefix(prefix: tuple[int, ...], nexts: Counter[int], law: Law) -> PrefixCounts:
    num = nexts.total()
    likely = [token for token, p in law.items() if num * p >= MIN_EXPECTED]
    others = max(1.0 - sum(law[token] for token in likely), ROUNDING)
    counts = [nexts[token] for token in likely]
    return PrefixCounts(
        prefix=list(prefix),
        token_ids=likely,
        counts=[*counts, num - sum(counts)],
        expected=[*(num * law[token] for token in likely), num * others],
    )


def chi_square_tail(chi_square: float, degrees: int) -> float:
    """Probability of at least this chi-square with so many degrees of freedom."""
    half = torch.tensor([degrees / 2, chi_square / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def poisson_tail(count: int, expected: float) -> float:
    """Probability of at least this count if ``expected`` is its mean."""
    if count == 0:
        return 1.0
    both = torch.tensor([count, expected], dtype=torch.float64)
    return torch.special.gammainc(both[0], both[1]).item()


def combine(p_values: Sequence[float]) -> float:
    """Several independent p-values as one, by Fisher's method."""
    logs = [math.log(max(p, 1e-300)) for p in p_values]
    return chi_square_tail(-2 * sum(logs), 2 * len(logs))
