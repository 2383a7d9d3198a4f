"""A draft that fails in long contexts gains by seeing less; others do not."""

import pytest
import torch

from speculators_core.decoding.acceptance import AcceptanceCounts
from speculators_core.decoding.drafter import Proposal
from speculators_core.diagnosis.contexts import ContextTrial, try_shorter_contexts
from speculators_core.diagnosis.replay import Reading, SeenText, replay, see
from speculators_core.diagnosis.suspects import Diagnosis, Trial
from tests.conftest import DRAFTS, make_draft

NUM_TOKENS = 3


class Counts:
    """Counts on from the last token, and wrongly where more than ``limit`` tokens are before it."""

    aux_layer_ids = (0,)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, limit):
        self.limit = limit

    def start_drafting(self):
        return None

    def propose(self, state, confirmed, num_tokens, choose):
        num_seen = int(confirmed.positions.max()) + 2  # the bonus token has no state yet
        first = int(confirmed.token_ids[0, -1]) + (1 if num_seen <= self.limit else 2)
        return Proposal((first + torch.arange(num_tokens))[None] % 10)


def counted(length, prompt_length):
    states = {0: torch.zeros(length, 1)}
    return SeenText(torch.arange(length) % 10, prompt_length, states)


TEXTS = [counted(length, length - 100) for length in (170, 200, 220)]


def test_a_draft_that_fails_beyond_a_length_is_found():
    found = try_shorter_contexts(Counts(40), TEXTS, NUM_TOKENS, 40)
    assert found.is_cause and found.window == 40 and found.longest == 220
    assert found.whole.acceptance_length == 1.0 and found.short.acceptance_length == 4.0
    assert not try_shorter_contexts(Counts(39), TEXTS, NUM_TOKENS, 40).is_cause


def test_a_sound_draft_gains_nothing_by_seeing_less():
    found = try_shorter_contexts(Counts(1000), TEXTS, NUM_TOKENS, 40)
    assert found.whole.acceptance_length == found.short.acceptance_length == 4.0
    assert not found.is_cause


def test_only_contexts_beyond_the_length_are_tried():
    assert try_shorter_contexts(Counts(40), TEXTS, NUM_TOKENS, 220) is None
    assert try_shorter_contexts(Counts(40), [], NUM_TOKENS, 40) is None
    (text,) = [counted(60, 10)]
    drafts = {
        limit: try_shorter_contexts(Counts(1), [text], NUM_TOKENS, limit).whole.num_drafts
        for limit in (40, 50)
    }
    # The last draft has its last token before the text's end: 41 to 56 tokens come before one.
    assert drafts == {40: 16, 50: 6}
    many = try_shorter_contexts(Counts(1), [counted(900, 10)] * 3, NUM_TOKENS, 40)
    assert many.whole.num_drafts < 900  # the first text has enough


def test_unknown_lengths_are_tried_with_common_ones():
    assert try_shorter_contexts(Counts(128), TEXTS, NUM_TOKENS).window == 128
    assert try_shorter_contexts(Counts(128), [counted(100, 20)], NUM_TOKENS) is None
    long = [counted(800, 700)] * 4
    found = try_shorter_contexts(Counts(128), long, NUM_TOKENS)
    assert found.window == 128 and found.is_cause


@pytest.mark.parametrize("name", DRAFTS)
def test_a_window_that_holds_the_text_changes_nothing(name, verifier):
    model = make_draft(name, verifier)
    text = see(verifier, [5, 9, 17, 3], list(range(20, 50)))
    whole = replay(Reading(model), text, NUM_TOKENS)
    assert replay(Reading(model, window=len(text.token_ids)), text, NUM_TOKENS) == whole
    late = replay(Reading(model), text, NUM_TOKENS, least_context=20)
    assert 0 < late.num_drafts < whole.num_drafts


@pytest.mark.parametrize(
    ("whole", "short", "is_cause"),
    [
        ([0, 1] * 40, [2, 1] * 40, True),
        ([0, 1] * 20, [2, 1] * 20, False),  # too few drafts
        ([1, 2] * 40, [2, 2] * 40, False),  # too small a gain
        ([0] * 99 + [1], [0] * 98 + [1, 1], False),  # twice as many, by chance
        ([0] * 60, [0] * 60, False),
    ],
)
def test_a_cause_is_a_large_gain_of_many_drafts(whole, short, is_cause):
    counts = [AcceptanceCounts(3, accepted) for accepted in (whole, short)]
    assert ContextTrial(40, 170, *counts).is_cause == is_cause


@pytest.mark.parametrize(
    ("fixed", "short", "is_cause"),
    [(None, 2.5, True), (1.6, 2.5, True), (2.6, 2.5, False), (None, 1.6, False)],
)
def test_the_length_is_the_cause_unless_another_reading_explains_more(fixed, short, is_cause):
    kept = [round(10 * (short - 1.0)) // 10 + (n % 10 < round(10 * short) % 10) for n in range(80)]
    trial = ContextTrial(40, 170, AcceptanceCounts(3, [0, 1] * 40), AcceptanceCounts(3, kept))
    assert trial.short.acceptance_length == pytest.approx(short)
    likely = None if fixed is None else Trial("rope", "another theta", 0.5, 9.0)
    found = Diagnosis(1.5, (), likely, fixed, trial)
    assert found.is_length_the_cause == is_cause
