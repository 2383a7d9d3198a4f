"""A roll-out finds what the reference decoder counts, as far as a text can tell."""

import inspect
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculators_core.decoding import acceptance
from speculators_core.decoding.acceptance import AcceptanceCounts
from speculators_core.decoding.drafter import Proposal
from speculators_core.decoding.independent import LanguageModelDraft
from speculators_core.diagnosis import replay
from speculators_core.diagnosis.replay import Reading, see
from speculators_core.diagnosis.rollout import (
    UNKNOWN,
    SurvivalCounts,
    VerifiedText,
    bonus_places,
    reachable_positions,
    roll_out,
    share_drafts,
)
from speculators_core.verifier.head import VerifierHead
from tests.conftest import DRAFTS, make_draft, make_verifier, pack_texts

PROMPTS = ([5, 9, 17, 3], [40, 41], [20, 21, 22, 60, 5, 5])
NUM_TOKENS = 3


def decode(model, prompt, num_tokens=NUM_TOKENS):
    return model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=40,
        num_assistant_tokens=num_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )


def answer(verifier, prompt, num_tokens=40):
    """The verifier's own greedy answer, as a text that it was run over."""
    ids = torch.tensor([prompt])
    output = verifier.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    return see(verifier, prompt, output[0, len(prompt) :].tolist())


def verified(verifier, text, layer_ids, shift=0):
    last = verifier.config.num_hidden_layers
    with torch.no_grad():
        choices = VerifierHead(verifier)(text.states[last]).argmax(-1)
    states = text.aux_states(layer_ids, shift) if layer_ids else text.states[last][:, :0]
    return VerifiedText(text.token_ids, states, choices)


def places_of(prompt_length, accepted):
    """Where the decoder drafted, that kept so many tokens."""
    places = [prompt_length]
    for kept in accepted:
        places.append(places[-1] + kept + 1)
    return places[:-1]


def roll_out_each(model, text, places, num_tokens=NUM_TOKENS):
    """At each place, whatever the draft before had right."""
    counts = SurvivalCounts.none(num_tokens)
    for place in places:
        counts += roll_out(model, text, [place], num_tokens)
    return counts


@pytest.fixture(scope="module")
def texts(verifier):
    return [answer(verifier, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module", params=DRAFTS)
def model(request, verifier, texts):
    """A draft that has learnt two of the three texts, so that some of what it says is right."""
    torch.manual_seed(0)
    draft = make_draft(request.param, verifier).train()
    batch = pack_texts(verifier, [{"input_ids": text.token_ids} for text in texts[:2]])
    optimizer = torch.optim.AdamW([w for w in draft.parameters() if w.requires_grad], 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        draft(batch)[1].backward()
        optimizer.step()
    return draft.eval()


# ---- laws ----


def test_over_greedy_answers_nothing_is_censored_but_by_the_end(model, verifier, texts):
    total = SurvivalCounts.none(NUM_TOKENS)
    for seen in texts:
        text = verified(verifier, seen, model.aux_layer_ids)
        length, start = len(text.token_ids), seen.prompt_length
        assert torch.equal(text.choices[start - 1 : -1], text.token_ids[start:])
        counts = roll_out_each(model, text, range(start, length - NUM_TOKENS))
        assert counts.num_places == length - NUM_TOKENS - start
        assert counts.at_risk[1:] == counts.right[:-1]
        at_the_end = roll_out_each(model, text, range(start, length))
        lost = [r - a for r, a in zip(at_the_end.right, at_the_end.at_risk[1:], strict=False)]
        assert all(0 <= count <= 1 for count in lost)  # of the one place that ends there
        total += counts
    assert 5 < total.right[2] <= total.right[1] <= total.right[0] < total.num_places


def test_over_an_answer_it_counts_what_the_decoder_counts(model, verifier):
    for prompt in PROMPTS:
        output = decode(model, prompt)
        seen = see(verifier, prompt, output.sequences[0, len(prompt) :].tolist())
        text = verified(verifier, seen, model.aux_layer_ids)
        accepted, length = output.acceptance[0].accepted, len(text.token_ids)
        decoded_at = places_of(len(prompt), accepted)
        whole = sum(place + NUM_TOKENS <= length for place in decoded_at)
        replayed = replay.replay(Reading(model), seen, NUM_TOKENS)
        assert whole >= len(replayed.accepted) > len(accepted) - 4
        for kept in (accepted[:whole], replayed.accepted):
            found = roll_out(model, text, range(len(prompt), length), NUM_TOKENS, len(kept))
            counts = AcceptanceCounts(NUM_TOKENS, kept)
            assert found == SurvivalCounts.of(counts)
            assert found.acceptance_length == pytest.approx(counts.acceptance_length)
        everywhere = roll_out_each(model, text, range(len(prompt), length))
        assert everywhere.num_places > found.num_places


def test_the_verifier_itself_is_kept_whole(verifier, texts):
    known = verified(verifier, texts[0], [])
    counts = roll_out(LanguageModelDraft(verifier), known, range(4, 40), 4)
    assert counts.acceptance_length == 5.0
    assert counts.right == counts.at_risk == (8, 8, 8, 8)  # at every fifth place


def test_the_verifier_itself_is_never_wrong_over_a_text_of_others():
    terse = make_verifier(vocab_size=6)  # a random text is now and then what it would have said
    draw = torch.Generator().manual_seed(3)
    text = see(terse, [5], torch.randint(6, (59,), generator=draw).tolist())
    counts = roll_out(LanguageModelDraft(terse), verified(terse, text, []), range(1, 60), 3)
    assert counts.right == counts.at_risk and counts.num_places > 40
    assert 0 < counts.at_risk[1] < 40  # the text mostly goes another way


@given(st.lists(st.integers(0, 5)))
def test_drafts_verified_whole_have_the_rates_of_the_readme(accepted):
    counts = AcceptanceCounts(5, accepted)
    found = SurvivalCounts.of(counts)
    assert found.num_places == counts.num_drafts
    assert found.acceptance_length == pytest.approx(counts.acceptance_length)
    kept_to = [counts.num_drafts, *counts.accepted_per_position]
    joint = [kept / max(1, counts.num_drafts) for kept in kept_to[1:]]
    assert found.joint == pytest.approx(joint)
    for k, rate in enumerate(found.conditional):
        assert rate == (kept_to[k + 1] / kept_to[k] if kept_to[k] else None)


# ---- one text by hand ----


class Says:
    """Says what a table has for the place of the bonus token."""

    aux_layer_ids: list[int] = []
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, table):
        self.table = table

    def start_drafting(self):
        return None

    def propose(self, state, confirmed, num_tokens, choose):
        return Proposal(torch.tensor([self.table[int(confirmed.positions[0, -1]) + 1]]))


TEXT = VerifiedText(
    token_ids=torch.tensor([0, 1, 2, 3, 4, 5, 6]),
    states=torch.zeros(7, 0),
    choices=torch.tensor([1, 2, 3, 9, 5, 6, 7]),
)


@pytest.mark.parametrize(
    ("place", "says", "at_risk", "right"),
    [
        (1, [2, 3, 9], (1, 1, 1), (1, 1, 1)),
        (2, [3, 9, 8], (1, 1, 0), (1, 1, 0)),  # the text goes on with 4, not with 9
        (3, [4, 5, 6], (1, 0, 0), (0, 0, 0)),  # the text's token, but not the verifier's
        (4, [5, 6, 0], (1, 1, 1), (1, 1, 0)),
        (5, [6, 7, 0], (1, 1, 0), (1, 1, 0)),  # nobody knows what follows 7
        (6, [8, 7, 0], (1, 0, 0), (0, 0, 0)),
    ],
)
def test_a_draft_counts_until_it_is_wrong_or_the_text_goes_another_way(place, says, at_risk, right):
    assert roll_out(Says({place: says}), TEXT, [place], 3) == SurvivalCounts(at_risk, right)


def test_rates_are_over_those_at_risk_and_multiply():
    table = {1: [2, 3, 9], 2: [3, 9, 8], 3: [4, 5, 6], 4: [5, 6, 0], 5: [6, 7, 0], 6: [8, 7, 0]}
    counts = roll_out_each(Says(table), TEXT, [1, 2, 3, 4, 5, 6])
    assert counts == SurvivalCounts((6, 4, 2), (4, 4, 1))
    assert counts.conditional == pytest.approx((2 / 3, 1.0, 1 / 2))
    assert counts.joint == pytest.approx((2 / 3, 2 / 3, 1 / 3))
    assert counts.acceptance_length == pytest.approx(1 + 5 / 3)
    parts = [roll_out_each(Says(table), TEXT, places) for places in ([1, 4, 6], [], [2, 3, 5])]
    assert parts[0] + parts[1] + parts[2] == counts
    assert parts[1] == SurvivalCounts.none(3) and parts[1].acceptance_length == 1.0


def test_a_draft_is_made_where_the_one_before_has_ended():
    table = {1: [2, 3, 9], 4: [7, 6, 0], 5: [6, 7, 0], 6: [8, 7, 0]}
    way = [roll_out(Says(table), TEXT, [place], 3) for place in (1, 4, 5)]
    # From 1 two tokens of the text are right, then one that the verifier says and the text has not.
    assert [counts.right for counts in way] == [(1, 1, 1), (0, 0, 0), (1, 1, 0)]
    assert roll_out(Says(table), TEXT, [1, 2, 3, 4, 5, 6], 3) == way[0] + way[1] + way[2]
    assert roll_out(Says(table), TEXT, [1, 2, 3, 4, 5, 6], 3, 2) == way[0] + way[1]
    assert roll_out(Says(table), TEXT, [1, 5, 6], 3) == way[0] + way[2]


def test_drafts_are_counted_by_the_tokens_before_them(monkeypatch):
    monkeypatch.setattr(acceptance, "CONTEXT_BUCKETS", {"<128": 6, "128-512": math.inf})
    table = {1: [2, 3, 9], 4: [7, 6, 0], 5: [6, 7, 0], 6: [8, 7, 0]}
    counts = roll_out(Says(table), TEXT, [1, 2, 3, 4, 5, 6], 3)
    short, long = (roll_out(Says(table), TEXT, places, 3) for places in ([1, 4], [5]))
    assert counts.contexts == {"<128": short, "128-512": long}  # places 4 and 5 have 5 and 6
    assert (counts + short).contexts == {"<128": short + short, "128-512": long}


def test_a_position_that_nobody_came_to_has_no_rate_and_adds_nothing():
    counts = SurvivalCounts((4, 2, 0), (3, 2, 0))
    assert counts.conditional == (0.75, 1.0, None)
    assert counts.joint == (0.75, 0.75, 0.0)
    assert counts.acceptance_length == 2.5


@pytest.mark.parametrize("places", [[0], [7], [3, 2], [2, 2], [-1]])
def test_places_that_no_decoder_drafts_at_are_refused(places):
    with pytest.raises(ValueError, match="ascending from 1 to 6"):
        roll_out(Says({}), TEXT, places, 3)


# ---- states matter ----


def predicted(model, verifier, texts, shift=0):
    counts = SurvivalCounts.none(NUM_TOKENS)
    for text in texts:
        places = range(text.prompt_length, len(text.token_ids))
        known = verified(verifier, text, model.aux_layer_ids, shift)
        counts += roll_out(model, known, places, NUM_TOKENS)
    return counts.acceptance_length


def test_states_of_another_token_are_seen_in_the_prediction(model, verifier, texts):
    right = predicted(model, verifier, texts[:2])
    assert right > 2.0
    for shift in (-1, 1):
        assert predicted(model, verifier, texts[:2], shift) < right - 0.5


def test_tokens_of_the_verifier_shifted_by_one_are_seen_in_the_prediction(model, verifier, texts):
    known = verified(verifier, texts[0], model.aux_layer_ids)
    shifted = VerifiedText(known.token_ids, known.states, known.choices.roll(1))
    places = range(texts[0].prompt_length, len(known.token_ids))
    right, wrong = (roll_out(model, one, places, 3).acceptance_length for one in (known, shifted))
    assert wrong < right - 0.5


def test_a_long_way_is_read_in_pieces(model, verifier, texts, monkeypatch):
    text = verified(verifier, texts[0], model.aux_layer_ids)
    places = [3, 20, 21, 37]
    whole = roll_out(model, text, places, NUM_TOKENS)
    assert whole.right[0] > 0
    monkeypatch.setattr(replay, "READ_AT_ONCE", 4)
    widths, propose = [], model.propose

    def watch(state, confirmed, *arguments):
        widths.append(confirmed.positions.shape[1])
        return propose(state, confirmed, *arguments)

    monkeypatch.setattr(model, "propose", watch)
    assert roll_out(model, text, places, NUM_TOKENS) == whole
    assert sum(widths) == 37 and max(widths) == 4


# ---- places ----


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([0, 0, 1, 1, 1, 0, 0, 1, 1], [2, 3, 7]),
        ([1, 1, 1], [1]),
        ([0, 1, 1, 1], [1, 2]),
        ([0, 0, 1], []),
        ([1], []),
    ],
)
def test_a_place_has_a_token_of_the_verifier_and_one_behind_it(mask, expected):
    assert bonus_places(torch.tensor(mask).bool()).tolist() == expected


def test_drafts_are_shared_among_texts_that_have_a_place():
    assert sorted(share_drafts([300, 0, 100, 50], 80)) == [0, 16, 32, 32]
    assert share_drafts([300, 0, 100, 50], 80)[1] == 0
    assert share_drafts([300, 0, 100], 500) == [250, 0, 250]
    orders = {tuple(share_drafts([9, 9, 9, 9], 40, seed)) for seed in range(20)}
    assert len(orders) > 3 and share_drafts([9] * 4, 40) == share_drafts([9] * 4, 40)
    assert share_drafts([], 5) == [] and share_drafts([7, 0], 0) == [0, 0]


def test_sharing_leaves_the_random_numbers_alone():
    before = random.getstate(), torch.get_rng_state()
    inspect.unwrap(share_drafts)([9] * 10, 100)  # checking the type of a list draws an item
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_no_draft_asks_for_more_than_what_is_reachable(model, verifier, texts):
    text = verified(verifier, texts[0], model.aux_layer_ids)
    length = len(text.token_ids)
    for num_drafts in (1, 3, 100):
        places = list(range(4, length))
        reached, rows = reachable_positions(places, num_drafts, 3, length)
        assert (len(reached) == len(places)) == (num_drafts == 100)
        choices = torch.full_like(text.choices, UNKNOWN)
        choices[rows] = text.choices[rows]
        few = VerifiedText(text.token_ids, text.states, choices)
        found = roll_out(model, few, reached, 3, num_drafts)
        assert found == roll_out(model, text, places, 3, num_drafts)
