import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from speculators_core.errors import SpeculatorError
from speculators_core.format.vocabulary import (
    check_vocabulary,
    choose_draft_vocabulary,
    count_trained_tokens,
    d2t_from_t2d,
    special_token_ids,
)
from tests.data import INTEROP


def test_most_frequent_tokens_then_lowest_ids():
    t2d, d2t = choose_draft_vocabulary({7: 5, 3: 9, 10: 1}, draft_vocab_size=4, vocab_size=12)
    assert d2t.tolist() == [0, 2, 5, 7]
    assert t2d.nonzero().flatten().tolist() == [0, 3, 7, 10]


def test_kept_tokens_stay_whatever_their_count():
    t2d, _ = choose_draft_vocabulary({7: 5, 3: 9}, 3, 12, always=[11])
    assert t2d.nonzero().flatten().tolist() == [3, 7, 11]


def test_maps_of_the_docstring():
    t2d = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.bool)
    assert d2t_from_t2d(t2d).tolist() == [1, 2, 2]


@given(st.dictionaries(st.integers(0, 19), st.integers(0, 5)), st.data())
@settings(max_examples=50, deadline=None)
def test_no_token_is_left_out_for_a_rarer_one(counts, data):
    always = data.draw(st.sets(st.integers(0, 19), max_size=4))
    size = data.draw(st.integers(len(always), 20))
    t2d, d2t = choose_draft_vocabulary(counts, size, 20, always)
    check_vocabulary(t2d, d2t)
    kept = set((d2t + torch.arange(size)).tolist())
    assert len(kept) == size and always <= kept
    worst = min((counts.get(i, 0) for i in kept - always), default=10)
    assert all(counts.get(i, 0) <= worst for i in set(range(20)) - kept)


@pytest.mark.parametrize(("size", "always"), [(13, ()), (1, (2, 3))])
def test_impossible_size_is_refused(size, always):
    with pytest.raises(ValueError, match="draft_vocab_size"):
        choose_draft_vocabulary({}, size, 12, always)


def test_maps_that_contradict_each_other_are_refused():
    t2d, d2t = choose_draft_vocabulary({7: 5}, 4, 12)
    check_vocabulary(t2d, d2t)
    with pytest.raises(SpeculatorError, match="contradict"):
        check_vocabulary(t2d, d2t + 1)
    with pytest.raises(SpeculatorError, match="contradict"):
        check_vocabulary(t2d, torch.zeros_like(d2t))


def test_only_trained_tokens_are_counted():
    documents = [
        {"input_ids": [5, 6, 5, 7], "loss_mask": [0, 1, 1, 1]},
        {"input_ids": [5, 9], "loss_mask": [1, 0]},
    ]
    assert count_trained_tokens(documents) == {6: 1, 5: 2, 7: 1}
    with pytest.raises(ValueError):
        count_trained_tokens([{"input_ids": [1, 2], "loss_mask": [1]}])


def test_special_tokens_are_those_that_no_text_spells():
    tokenizer = AutoTokenizer.from_pretrained(INTEROP / "verifier")
    special = special_token_ids(tokenizer, 2048)
    assert special >= set(tokenizer.all_special_ids)
    tokenizer.add_tokens(["<tool>"])
    added = tokenizer.convert_tokens_to_ids("<tool>")
    assert special_token_ids(tokenizer, added + 1) - special == {added}
    assert special_token_ids(tokenizer, added) == special  # the verifier cannot propose it
    t2d, _ = choose_draft_vocabulary({100: 3}, len(special) + 1, 2048, always=special)
    assert t2d.nonzero().flatten().tolist() == sorted(special | {100})
