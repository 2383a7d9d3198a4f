from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot, pad

from speculators_core.decoding.acceptance import (
    CONTEXT_BUCKETS,
    Acceptance,
    AcceptanceCounts,
    Cell,
    accept_greedy,
    accept_sampled,
    acceptance_probability,
    merge_contexts,
    next_token_probs,
    reached_and_kept,
    worst_cell,
)

# Greedy verification


def logits_of(tokens, vocab=10):
    return one_hot(torch.tensor(tokens), vocab).float()


@pytest.mark.parametrize(
    ("draft", "verifier", "kept", "following"),
    [
        ([7, 3, 9, 2], [7, 3, 5, 2, 8], 2, 5),
        ([7, 3, 9, 2], [7, 3, 9, 2, 8], 4, 8),
        ([7, 3, 9, 2], [1, 3, 9, 2, 8], 0, 1),
        ([], [6], 0, 6),
    ],
)
def test_longest_agreeing_prefix_is_kept(draft, verifier, kept, following):
    draft, scores = torch.tensor([draft], dtype=torch.long), logits_of([verifier])
    certain = accept_sampled(draft, None, scores)
    for decided in (accept_greedy(draft, scores), accept_greedy(draft.int(), scores), certain):
        assert decided.num_accepted.tolist() == [kept]
        assert decided.next_token.tolist() == [following]


def test_rows_are_decided_apart():
    decided = accept_greedy(torch.tensor([[1, 2], [3, 4]]), logits_of([[1, 9, 0], [3, 4, 5]]))
    assert decided.num_accepted.tolist() == [1, 2]
    assert decided.next_token.tolist() == [9, 5]


INF = float("inf")


@pytest.mark.parametrize(
    ("scores", "token", "accept_k", "tolerance", "is_kept"),
    [
        ([2.0, 2.0, 1.0], 0, 1, 0.0, True),
        ([2.0, 2.0, 1.0], 1, 1, 0.0, False),  # as good as the best, yet not argmax's choice
        ([2.0, 2.0, 1.0], 1, 2, 0.0, True),
        ([2.0, 2.0, 1.0], 2, 2, 0.0, False),
        ([3.0, 1.0, 1.0], 2, 2, 0.0, True),  # one token outscores it
        ([3.0, 2.0, 1.0], 2, 9, 0.0, True),
        ([3.0, 2.0, 1.0], 1, 1, 0.5, False),
        ([3.0, 2.0, 1.0], 1, 1, 1.0, True),
        ([2.0, 0.99609375, 0.0], 1, 1, 1.0, False),  # bf16 rounds this gap to 1
        ([3.0, -INF, -INF], 1, 3, 0.0, False),
        ([3.0, -INF, -INF], 1, 1, INF, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lossy_options_keep_what_is_nearly_best(scores, token, accept_k, tolerance, is_kept, dtype):
    verifier = torch.tensor([[scores, [0.0, 0.0, 1.0]]], dtype=dtype)
    decided = accept_greedy(torch.tensor([[token]]), verifier, accept_k, tolerance)
    assert decided.num_accepted.tolist() == [int(is_kept)]
    assert decided.next_token.tolist() == [2 if is_kept else 0]


BATCH, DRAFT, VOCAB = 3, 3, 4
# Few values, so that most rows have a tie.
some_scores = st.lists(
    st.integers(0, 3), min_size=BATCH * (DRAFT + 1) * VOCAB, max_size=BATCH * (DRAFT + 1) * VOCAB
).map(lambda values: torch.tensor(values).view(BATCH, DRAFT + 1, VOCAB).float())
some_drafts = st.lists(
    st.integers(0, VOCAB - 1), min_size=BATCH * DRAFT, max_size=BATCH * DRAFT
).map(lambda tokens: torch.tensor(tokens).view(BATCH, DRAFT))


def keep_one_by_one(draft, scores, accept_k=1, tolerance=0.0):
    """The rule in plain Python, for one row of the batch."""
    for position, (token, row) in enumerate(zip(draft, scores, strict=False)):
        better = sum(score > row[token] for score in row)
        nearly = better < accept_k or max(row) - row[token] <= tolerance
        is_lossy = accept_k > 1 or tolerance > 0.0
        if token != row.index(max(row)) and not (is_lossy and nearly):
            return position, row.index(max(row))
    return len(draft), scores[-1].index(max(scores[-1]))


@given(some_drafts, some_scores, st.integers(1, VOCAB), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
@settings(max_examples=150, deadline=None)
def test_greedy_equals_the_rule_written_token_by_token(draft, scores, accept_k, tolerance):
    for options in ((), (accept_k, tolerance)):
        decided = accept_greedy(draft, scores, *options)
        expected = [
            keep_one_by_one(*row, *options)
            for row in zip(draft.tolist(), scores.tolist(), strict=True)
        ]
        found = zip(decided.num_accepted.tolist(), decided.next_token.tolist(), strict=True)
        assert list(found) == expected


@given(
    some_drafts,
    some_scores,
    st.tuples(st.integers(1, VOCAB), st.integers(1, VOCAB)).map(sorted),
    st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 3.0)).map(sorted),
)
@settings(max_examples=150, deadline=None)
def test_looser_options_keep_no_less(draft, scores, accept_ks, tolerances):
    strict, loose = (
        accept_greedy(draft, scores, k, tolerance).num_accepted
        for k, tolerance in zip(accept_ks, tolerances, strict=True)
    )
    assert (strict <= loose).all()


@given(some_drafts, some_scores)
@settings(max_examples=50, deadline=None)
def test_a_certain_verifier_samples_as_it_decides_greedily(draft, scores):
    certain = one_hot(scores.argmax(-1), VOCAB).float()
    uniform = torch.full((BATCH, DRAFT, VOCAB), 1 / VOCAB)
    greedy = accept_greedy(draft, scores)
    sampled = accept_sampled(draft, None, certain)
    assert torch.equal(sampled.num_accepted, greedy.num_accepted)
    assert torch.equal(sampled.next_token, greedy.next_token)
    assert torch.equal(accept_sampled(draft, uniform, certain).num_accepted, greedy.num_accepted)


# Sampled verification: the law of what is emitted.
#
# A model is a list of tables. Table t has t + 1 axes of the vocabulary's size: the t tokens before,
# then the distribution of the next one. The verifier has one table more than the draft.


def softmax_rows(shape, generator, scale=1.0):
    return (scale * torch.randn(shape, generator=generator)).softmax(-1)


def allow(probs, allowed):
    probs = probs * allowed
    return probs / probs.sum(-1, keepdim=True)


def some_tokens(shape, generator):
    """A mask with at least one token in each row."""
    noise = torch.rand(shape, generator=generator)
    return (noise > 0.5) | (noise == noise.amax(-1, keepdim=True))


def equal(shape, generator):
    probs = softmax_rows(shape, generator)
    return probs, probs.clone()


def equal_but_for_rounding(shape, generator):
    probs = softmax_rows(shape, generator)
    return probs, probs * (1 + 2e-7 * (torch.rand(shape, generator=generator) - 0.5))


def disjoint(shape, generator):
    is_even = torch.arange(shape[-1]) % 2 == 0
    probs = softmax_rows(shape, generator), softmax_rows(shape, generator)
    return allow(probs[0], is_even), allow(probs[1], ~is_even)


def zero_mass(shape, generator):
    p, q = (allow(softmax_rows(shape, generator), some_tokens(shape, generator)) for _ in "pq")
    return p, q


def reduced_vocabulary(shape, generator):
    is_drafted = torch.arange(shape[-1]) < (shape[-1] + 1) // 2
    return softmax_rows(shape, generator), allow(softmax_rows(shape, generator), is_drafted)


CASES = {
    "random": lambda shape, g: (softmax_rows(shape, g), softmax_rows(shape, g)),
    "peaked": lambda shape, g: (softmax_rows(shape, g, 6.0), softmax_rows(shape, g, 6.0)),
    "certain verifier": lambda shape, g: (softmax_rows(shape, g, 1e4), softmax_rows(shape, g)),
    "equal": equal,
    "equal but for rounding": equal_but_for_rounding,
    "disjoint": disjoint,
    "zero mass": zero_mass,
    "reduced vocabulary": reduced_vocabulary,
}


def make_tables(case, vocab, draft, is_greedy, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = [CASES[case]([vocab] * (t + 1), generator) for t in range(draft + 1)]
    p_tables, q_tables = (
        [table.to(dtype) for table in tables] for tables in zip(*pairs, strict=True)
    )
    if is_greedy:
        q_tables = [one_hot(table.argmax(-1), vocab).to(dtype) for table in q_tables]
    return p_tables, q_tables[:draft]


def index_of(tokens, vocab):
    """Number of each row of tokens, the first token counting most."""
    index = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.T:
        index = index * vocab + column
    return index


def row_after(table, tokens):
    vocab = table.shape[-1]
    return table.reshape(-1, vocab)[index_of(tokens, vocab)]  # [batch, vocab]


def rows_along(tables, tokens, vocab):
    rows = [row_after(table, tokens[:, :t]) for t, table in enumerate(tables)]
    return torch.stack(rows, 1) if rows else torch.empty(len(tokens), 0, vocab)


def continued(law, tables):
    """Joint law of the tokens so far and of one more for each table."""
    for table in tables:
        law = law[..., None] * table.double()
    return law


def emitted_law(p_tables, q_tables, told, accept=acceptance_probability, replace=next_token_probs):
    """Joint law of the emitted tokens and, after them, the verifier's own up to a fixed length.

    Every draft is enumerated. ``told`` makes the draft's rows into what verification is told.
    """
    vocab, draft = len(p_tables[0]), len(q_tables)
    drafts = torch.tensor(list(product(range(vocab), repeat=draft)), dtype=torch.long)
    p = rows_along(p_tables, drafts, vocab)
    q = told(rows_along(q_tables, drafts, vocab))
    drawn = continued(torch.ones((), dtype=torch.double), q_tables).flatten()  # [drafts]
    keep = accept(drafts, q, p)
    reach = pad(keep.cumprod(-1), (1, 0), value=1.0)  # [drafts, draft + 1]
    stop = drawn[:, None] * reach * (1.0 - pad(keep, (0, 1)))
    law = torch.zeros([vocab] * (draft + 1), dtype=torch.double)
    for kept in range(draft + 1):
        following = replace(drafts, q, p, torch.full((len(drafts),), kept))
        chance = (stop[:, kept, None] * following).view(vocab**kept, -1, vocab).sum(1)
        law += continued(chance.view([vocab] * (kept + 1)), p_tables[kept + 1 :])
    return law


def verifier_law(p_tables):
    return continued(torch.ones((), dtype=torch.double), p_tables)


def worst_difference(p_tables, q_tables, told, *rule):
    difference = emitted_law(p_tables, q_tables, told, *rule) - verifier_law(p_tables)
    return difference.abs().max().item()


def tell_nothing(q_rows):
    return None


def tell_probs(q_rows):
    return q_rows


SIZES = [(3, 0), (2, 1), (2, 3), (3, 2), (4, 1), (4, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize(("vocab", "draft"), SIZES)
@pytest.mark.parametrize("case", CASES)
def test_emitted_tokens_follow_the_verifiers_joint_law(case, vocab, draft, is_greedy, dtype):
    told = tell_nothing if is_greedy else tell_probs
    for seed in range(3):
        tables = make_tables(case, vocab, draft, is_greedy, dtype, seed)
        assert worst_difference(*tables, told) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_a_drawn_token_may_be_judged_as_a_chosen_one(case):
    tables = make_tables(case, vocab=3, draft=2, is_greedy=False)
    assert worst_difference(*tables, tell_nothing) < 1e-6


def row_pair(q, p, kept):
    """The rows p and q of the token after the kept ones; all rows of the batch keep as many."""
    row = int(kept[0])
    return p[:, row].double(), pad(q, (0, 0, 0, 1))[:, row].double()


def normalized(mass):
    return mass / mass.sum(-1, keepdim=True)


def inverted_acceptance(tokens, q, p):
    p, q = (rows.gather(-1, tokens[..., None]).squeeze(-1).double() for rows in (p[:, :-1], q))
    return (q / p).clamp_max(1.0)


def acceptance_without_q(tokens, q, p):
    return acceptance_probability(tokens, None, p)


def acceptance_of_all(tokens, q, p):
    return torch.ones(tokens.shape, dtype=torch.double)


def next_from_p(tokens, q, p, kept):
    return row_pair(q, p, kept)[0]


def next_from_absolute_difference(tokens, q, p, kept):
    p_row, q_row = row_pair(q, p, kept)
    return normalized((p_row - q_row).abs())


def next_from_q_minus_p(tokens, q, p, kept):
    p_row, q_row = row_pair(q, p, kept)
    return normalized((q_row - p_row).clamp_min(0.0) if kept[0] < tokens.shape[1] else p_row)


def bonus_from_the_last_refusal(tokens, q, p, kept):
    return next_token_probs(tokens, q, p, kept.clamp_max(tokens.shape[1] - 1))


def next_from_the_row_after(tokens, q, p, kept):
    return next_token_probs(tokens, q, p, (kept + 1).clamp_max(tokens.shape[1]))


WRONG_RULES = [
    (inverted_acceptance, next_token_probs),
    (acceptance_without_q, next_token_probs),
    (acceptance_of_all, next_token_probs),
    (acceptance_probability, next_from_p),
    (acceptance_probability, next_from_absolute_difference),
    (acceptance_probability, next_from_q_minus_p),
    (acceptance_probability, bonus_from_the_last_refusal),
    (acceptance_probability, next_from_the_row_after),
]


@pytest.mark.parametrize("rule", WRONG_RULES, ids=lambda rule: "-".join(f.__name__ for f in rule))
def test_a_wrong_rule_breaks_the_joint_law(rule):
    tables = make_tables("random", vocab=3, draft=2, is_greedy=False)
    assert worst_difference(*tables, tell_probs) < 1e-6
    assert worst_difference(*tables, tell_probs, *rule) > 1e-2


def tell_probs_of_another_draw(q_rows):
    """Rows whose best token the greedy draft is, but which it was not drawn from."""
    return normalized(q_rows + 0.5)


def test_a_greedy_draft_judged_by_probabilities_breaks_the_joint_law():
    tables = make_tables("random", vocab=3, draft=2, is_greedy=True)
    assert worst_difference(*tables, tell_probs_of_another_draw) > 1e-2


# Sampled verification: draws.

NUM_DRAWS = 300_000
SMALLEST_P_VALUE = 1e-4


def choose(table, tokens, generator):
    return torch.multinomial(row_after(table, tokens), 1, generator=generator)  # [batch, 1]


def draw_sequences(p_tables, q_tables, told, accept=accept_sampled, seed=0):
    """Real drafts, judged in one batch, then followed by the verifier's own draws."""
    vocab, generator = len(p_tables[0]), torch.Generator().manual_seed(seed)
    drafts = torch.empty(NUM_DRAWS, 0, dtype=torch.long)
    for table in q_tables:
        drafts = torch.cat([drafts, choose(table, drafts, generator)], 1)
    q = told(rows_along(q_tables, drafts, vocab))
    decided = accept(drafts, q, rows_along(p_tables, drafts, vocab), generator)
    sequences = drafts[:, :0]
    for position, table in enumerate(p_tables):
        token = choose(table, sequences, generator)
        is_next = position == decided.num_accepted
        token = torch.where(is_next[:, None], decided.next_token[:, None], token)
        if position < drafts.shape[1]:
            is_kept = position < decided.num_accepted
            token = torch.where(is_kept[:, None], drafts[:, position, None], token)
        sequences = torch.cat([sequences, token], 1)
    return sequences  # [draws, draft + 1]


def p_value(sequences, law):
    """Of Pearson's chi-square test; cells of less than five expected draws are pooled."""
    law = law / law.sum()
    counts = index_of(sequences, len(law)).bincount(minlength=law.numel()).double()
    law = law.flatten()
    if counts[law == 0.0].any():
        return 0.0
    expected, order = (law[law > 0.0] * len(sequences)).sort()
    counts = counts[law > 0.0][order]
    num_rare = int((expected < 5.0).sum())
    if expected[:num_rare].sum() < 5.0:
        num_rare += 1
    expected, counts = (
        torch.cat([x[:num_rare].sum()[None], x[num_rare:]]) for x in (expected, counts)
    )
    if len(expected) == 1:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1, dtype=torch.double)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def test_p_value_equals_a_tabulated_one():
    # Chi-square 12.5 + 12.5 = 25 on one degree of freedom has p = 5.733e-7.
    sequences = torch.tensor([[0]] * 250 + [[1]] * 150)
    assert p_value(sequences, torch.tensor([0.5, 0.5])) == pytest.approx(5.733e-7, rel=1e-3)
    assert p_value(sequences, torch.tensor([1.0, 0.0])) == 0.0


@pytest.mark.parametrize("is_greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_verifiers_joint_law(case, is_greedy):
    told = tell_nothing if is_greedy else tell_probs
    for vocab, draft in [(3, 2), (4, 3)]:
        p_tables, q_tables = make_tables(case, vocab, draft, is_greedy)
        sequences = draw_sequences(p_tables, q_tables, told)
        assert p_value(sequences, verifier_law(p_tables)) > SMALLEST_P_VALUE


def accept_then_draw_from_p(drafts, q, p, generator):
    kept = accept_sampled(drafts, q, p, generator).num_accepted
    rows = p[torch.arange(len(p)), kept]
    return Acceptance(kept, torch.multinomial(rows, 1, generator=generator).squeeze(1))


def accept_by_the_row_before(drafts, q, p, generator):
    return accept_sampled(drafts, q, p.roll(1, 1), generator)


def accept_one_more(drafts, q, p, generator):
    decided = accept_sampled(drafts, q, p, generator)
    return Acceptance((decided.num_accepted + 1).clamp_max(drafts.shape[1]), decided.next_token)


@pytest.mark.parametrize(
    "accept", [accept_then_draw_from_p, accept_by_the_row_before, accept_one_more]
)
@pytest.mark.parametrize("is_greedy", [False, True], ids=["sampled", "greedy"])
def test_draws_by_a_wrong_rule_fail_the_chi_square_test(accept, is_greedy):
    told = tell_nothing if is_greedy else tell_probs
    p_tables, q_tables = make_tables("random", 3, 2, is_greedy)
    sequences = draw_sequences(p_tables, q_tables, told, accept)
    assert p_value(sequences, verifier_law(p_tables)) < 1e-12


def test_without_a_draft_the_next_token_is_the_verifiers():
    law = torch.tensor([0.1, 0.0, 0.6, 0.3])
    p = law.expand(NUM_DRAWS, 1, 4)
    for q in (None, p[:, :0]):
        drafts, generator = torch.empty(NUM_DRAWS, 0, dtype=torch.long), torch.Generator()
        decided = accept_sampled(drafts, q, p, generator.manual_seed(0))
        assert not decided.num_accepted.any()
        assert p_value(decided.next_token[:, None], law.double()) > SMALLEST_P_VALUE


# Sampled verification: edges.


def emits_only_possible_tokens(drafts, p, decided):
    of_drafts = p[:, :-1].gather(-1, drafts[..., None]).squeeze(-1)
    is_kept = torch.arange(drafts.shape[1]) < decided.num_accepted[:, None]
    of_next = p[torch.arange(len(p)), decided.num_accepted, decided.next_token]
    return (of_drafts[is_kept] > 0.0).all() and (of_next > 0.0).all()


def impossible_drafts(num_rows, vocab=12, draft=4):
    """Drafts that nothing suggests, and distributions with zeros where those tokens often fall."""
    generator = torch.Generator().manual_seed(0)
    p, _ = zero_mass([num_rows, draft + 1, vocab], generator)
    q, _ = zero_mass([num_rows, draft, vocab], generator)
    return torch.randint(vocab, (num_rows, draft), generator=generator), q, p


@pytest.mark.parametrize("told", [tell_nothing, tell_probs])
def test_no_token_without_verifier_probability_is_emitted(told):
    drafts, q, p = impossible_drafts(100_000)
    decided = accept_sampled(drafts, told(q), p, torch.Generator().manual_seed(0))
    assert emits_only_possible_tokens(drafts, p, decided)
    assert set(decided.num_accepted.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("told", [tell_nothing, tell_probs])
def test_no_such_token_is_emitted_by_the_unluckiest_draws_either(told, monkeypatch):
    drafts, q, p = impossible_drafts(1_000)
    monkeypatch.setattr(torch, "rand", lambda shape, generator=None, **kw: torch.zeros(shape, **kw))
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    assert emits_only_possible_tokens(drafts, p, accept_sampled(drafts, told(q), p))


def test_acceptance_probability_of_tokens_that_cannot_have_been_drawn():
    p = torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 2])
    q = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    chances = [acceptance_probability(torch.tensor([[t]]), q, p).item() for t in range(4)]
    assert chances == [0.5, 1.0, 0.0, 0.0]


def test_next_token_comes_from_p_where_no_mass_is_left():
    p = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    told = torch.tensor([[0]]), p[:, :1] * (1 + 1e-6), p
    assert next_token_probs(*told, torch.tensor([0])).tolist() == [[0.25, 0.75]]
    assert next_token_probs(*told, torch.tensor([1])).tolist() == [[0.5, 0.5]]


def test_worked_row_of_the_residual():
    p, q = torch.tensor([[[0.5, 0.3, 0.2]] * 2]), torch.tensor([[[0.2, 0.2, 0.6]]])
    found = next_token_probs(torch.tensor([[2]]), q, p, torch.tensor([0]))
    assert found[0].tolist() == pytest.approx([0.75, 0.25, 0.0])
    chosen = next_token_probs(torch.tensor([[2]]), None, p, torch.tensor([0]))
    assert chosen[0].tolist() == pytest.approx([0.625, 0.375, 0.0])


def test_one_seed_gives_one_decision():
    drafts, q, p = impossible_drafts(1_000)
    first, second, other = (
        accept_sampled(drafts, q, p, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.num_accepted, second.num_accepted)
    assert torch.equal(first.next_token, second.next_token)
    assert not torch.equal(first.next_token, other.next_token)


# Counts


def test_drafts_are_counted_by_the_tokens_before_them():
    """Four drafts after a prompt of 125 tokens and the verifier's first token."""
    # tokens before each: 126, 128, 129, 132
    found = AcceptanceCounts(3, [1, 0, 2, 3]).by_context(125)
    assert found == {
        "<128": AcceptanceCounts(3, [1]),
        "128-512": AcceptanceCounts(3, [0, 2, 3]),
    }


@given(st.lists(st.integers(0, 3)), st.integers(0, 40_000))
def test_ranges_of_context_hold_every_draft_in_order(accepted, num_prompt_tokens):
    found = AcceptanceCounts(3, accepted).by_context(num_prompt_tokens)
    assert [kept for counts in found.values() for kept in counts.accepted] == accepted
    assert list(found) == [name for name in CONTEXT_BUCKETS if name in found]


@pytest.mark.parametrize(
    ("context", "name"),
    [(127, "<128"), (128, "128-512"), (2047, "512-2k"), (2048, "2k-8k"), (10**6, "32k+")],
)
def test_a_range_of_context_ends_before_its_bound(context, name):
    assert list(AcceptanceCounts(1, [0]).by_context(context - 1)) == [name]


def test_ranges_of_several_texts_are_put_together_in_order():
    parts = [AcceptanceCounts(2, [1]).by_context(600), AcceptanceCounts(2, [0, 2]).by_context(5)]
    assert list(merge_contexts(parts, 2)) == ["<128", "512-2k"]
    assert merge_contexts([*parts, parts[0]], 2)["512-2k"] == AcceptanceCounts(2, [1, 1])
    assert merge_contexts([], 2) == {}


def test_the_worst_cell_is_that_with_the_lowest_conditional_rate_of_enough_drafts():
    contexts = {
        "<128": reached_and_kept(200, [100, 49, 0]),  # 0.50, 0.49, and too few to count
        "128-512": reached_and_kept(100, [60, 6]),  # 0.60, 0.10
        "512-2k": reached_and_kept(49, [0]),
    }
    found = worst_cell(contexts)
    assert found == Cell("128-512", 2, 60, 6)
    assert str(found) == "position 2 with 128-512 tokens of context, 6 of 60 kept (0.10)"
    assert worst_cell({"<128": [(50, 5)], "2k-8k": [(90, 9)]}).context == "2k-8k"
    assert worst_cell({"512-2k": [(49, 0)]}) is None
