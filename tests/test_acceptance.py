import pytest
import torch

from speculators_core.acceptance import accept_greedy


def logits_of(tokens, vocab=10):
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab).float()


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
    decided = accept_greedy(torch.tensor([draft], dtype=torch.long), logits_of([verifier]))
    assert decided.num_accepted.tolist() == [kept]
    assert decided.next_token.tolist() == [following]


def test_rows_are_decided_apart():
    decided = accept_greedy(torch.tensor([[1, 2], [3, 4]]), logits_of([[1, 9, 0], [3, 4, 5]]))
    assert decided.num_accepted.tolist() == [1, 2]
    assert decided.next_token.tolist() == [9, 5]
