import pytest
import torch

from speculators_core.errors import SpeculatorError
from speculators_core.vocabulary import check_vocabulary, choose_draft_vocabulary


def test_most_frequent_tokens_then_lowest_ids():
    t2d, d2t = choose_draft_vocabulary({7: 5, 3: 9, 10: 1}, draft_vocab_size=4, vocab_size=12)
    assert d2t.tolist() == [0, 2, 5, 7]
    assert t2d.nonzero().flatten().tolist() == [0, 3, 7, 10]


def test_kept_tokens_stay_whatever_their_count():
    t2d, _ = choose_draft_vocabulary({7: 5, 3: 9}, 3, 12, always=[11])
    assert t2d.nonzero().flatten().tolist() == [3, 7, 11]


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
