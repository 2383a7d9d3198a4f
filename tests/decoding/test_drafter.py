import torch

from speculators_core.decoding.drafter import Chooser, Proposal, join

IDS = torch.tensor([1, 4, 5])
LOGITS = torch.tensor([[[0.1, 2.0, 0.3], [5.0, 0.0, 0.0]]])


def test_best_token_is_chosen_and_nothing_drawn():
    whole, reduced = Chooser()(LOGITS), Chooser()(LOGITS, IDS, 7)
    assert whole.token_ids.tolist() == [[1, 0]] and whole.probs is None
    assert reduced.token_ids.tolist() == [[4, 1]] and reduced.probs is None


def test_drawn_tokens_follow_their_probabilities():
    generator = torch.Generator().manual_seed(0)
    proposal = Chooser(0.5, generator)(LOGITS.expand(4000, -1, -1), IDS, 7)
    assert proposal.probs is not None and proposal.probs.shape == (4000, 2, 7)
    expected = torch.zeros(2, 7)
    expected[:, IDS] = (LOGITS[0] / 0.5).softmax(-1)
    assert torch.allclose(proposal.probs[17], expected)
    for place in range(2):
        counts = torch.bincount(proposal.token_ids[:, place], minlength=7) / 4000
        # Five standard deviations of a frequency, at most.
        assert (counts - expected[place]).abs().max() < 5 * 0.5 / 4000**0.5
        assert (counts[expected[place] == 0] == 0).all()


def test_same_generator_draws_the_same():
    flat = torch.zeros(1, 20, 3)
    draws = [Chooser(1.0, torch.Generator().manual_seed(seed))(flat) for seed in (3, 3, 4)]
    assert torch.equal(draws[0].token_ids, draws[1].token_ids)
    assert not torch.equal(draws[0].token_ids, draws[2].token_ids)


def test_low_temperature_draws_the_best_token():
    assert Chooser(1e-3)(LOGITS, IDS, 7).token_ids.tolist() == [[4, 1]]


def test_proposals_join_in_order():
    chooser = Chooser(1.0, torch.Generator().manual_seed(0))
    parts = [chooser(LOGITS[:, :1], IDS, 7), chooser(LOGITS[:, 1:], IDS, 7)]
    joined = join(parts)
    assert joined.token_ids.tolist() == [[p.token_ids.item() for p in parts]]
    assert joined.probs is not None and parts[1].probs is not None
    assert torch.equal(joined.probs[:, 1:], parts[1].probs)
    assert join([Proposal(torch.tensor([[3]])), Proposal(torch.tensor([[2]]))]).probs is None
