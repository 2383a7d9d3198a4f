"""Pure statistics: no engine runs here."""

import math
import random

import pytest

from speculators_vllm.verdicts.chi_square import (
    MIN_DRAWS,
    chi_square_tail,
    combine,
    compare,
    count_prefixes,
    poisson_tail,
)

LAW = {0: 0.6, 1: 0.25, 2: 0.1, 3: 0.04, 4: 0.01}


def sample(seed, num_draws=300, num_tokens=4, law=LAW, skewed=None):
    """Draws of a law that forgets what came before; ``skewed`` holds after the first token."""
    chance = random.Random(seed)

    def pick(by_token):
        return chance.choices(list(by_token), list(by_token.values()))[0]

    later = skewed or law
    return [[pick(law)] + [pick(later) for _ in range(num_tokens - 1)] for _ in range(num_draws)]


def p_of(draws, law=LAW):
    return compare(0, draws, {prefix: law for prefix in count_prefixes(draws)}).p_value


def test_tails_are_those_of_the_tables():
    assert chi_square_tail(3.841459, 1) == pytest.approx(0.05, rel=1e-5)
    assert chi_square_tail(29.588298, 10) == pytest.approx(0.001, rel=1e-5)
    exact = 1 - sum(math.exp(-2.5) * 2.5**k / math.factorial(k) for k in range(4))
    assert poisson_tail(4, 2.5) == pytest.approx(exact)
    assert poisson_tail(0, 2.5) == 1.0


def test_combined_chance_of_one_is_itself():
    assert combine([0.03]) == pytest.approx(0.03)
    assert combine([0.04, 0.04]) == pytest.approx(0.0016 * (1 - math.log(0.0016)))


def test_chances_of_lossless_draws_are_evenly_spread():
    found = sorted(p_of(sample(seed)) for seed in range(100))
    furthest = max(abs(p - (rank + 0.5) / 100) for rank, p in enumerate(found))
    assert furthest < 0.163  # Kolmogorov's bound of one in a hundred
    assert min(found) > 1e-4


@pytest.mark.parametrize("token", LAW)
def test_each_tokens_surplus_is_caught(token):
    skewed = {t: 0.8 * p for t, p in LAW.items()}
    skewed[token] += 0.2
    assert p_of(sample(0, num_draws=2000, skewed=skewed)) < 1e-4


def test_what_the_law_hardly_knows_is_caught_after_any_prefix():
    certain = {0: 1 - 1e-6}
    honest = [[0, 0, 0] for _ in range(300)]
    assert p_of(honest, certain) == 1.0
    honest[7][2] = 9
    assert p_of(honest, certain) < 1e-2
    honest[8][1] = 9
    assert p_of(honest, certain) < 1e-5


def test_the_first_token_is_not_tested():
    assert p_of([[4, *draw[1:]] for draw in sample(1)]) > 1e-3
    assert () not in count_prefixes(sample(1))


def test_a_law_may_depend_on_the_prefix():
    """Tokens whose shares are right in all, and wrong after each prefix."""
    draws = [[first, first] for first, *_ in sample(2, law={0: 0.5, 1: 0.5})]
    even = {0: 0.5, 1: 0.5}
    assert p_of(draws, even) < 1e-4
    laws = {(0,): {0: 1 - 1e-7}, (1,): {1: 1 - 1e-7}}
    assert compare(0, draws, laws).p_value == 1.0


def test_counts_of_a_prefix_are_those_of_its_draws():
    draws = [[5, 0]] * 60 + [[5, 1]] * 25 + [[5, 2]] * 15 + [[6, 0]] * (MIN_DRAWS - 1)
    test = compare(3, draws, {(5,): LAW})
    (counts,) = test.prefixes
    assert (test.prompt, test.num_draws, counts.prefix) == (3, 109, [5])
    assert counts.token_ids == [0, 1, 2] and counts.counts == [60, 25, 15, 0]
    assert counts.expected == pytest.approx([60, 25, 10, 5])
    assert test.degrees == 3 and test.chi_square == pytest.approx(25 / 10 + 5)
