import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators_core.errors import SpeculatorError
from speculators_core.losses import LOSSES, weighted_loss

P = torch.tensor([0.5, 0.3, 0.2])
Q = torch.tensor([0.2, 0.3, 0.5])
M = (P + Q) / 2
ACCEPTANCE = 0.2 + 0.3 + 0.2
KL = (P * (P / Q).log()).sum().item()
EXPECTED = {
    "kl_div": KL,
    "rkl": (Q * (Q / P).log()).sum().item(),
    "jsd": 0.5 * ((P * (P / M).log()).sum() + (Q * (Q / M).log()).sum()).item(),
    "ce": -math.log(0.2),
    "tv": 1 - ACCEPTANCE,
    "nla": -math.log(ACCEPTANCE),
    "lk_hybrid": math.exp(-3 * ACCEPTANCE) * KL + (1 - math.exp(-3 * ACCEPTANCE)) * 0.3,
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_its_formula(name):
    assert LOSSES[name](Q.log()[None], P.log()[None]).item() == pytest.approx(EXPECTED[name])


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"ce"}))
def test_equal_distributions_lose_nothing(name):
    logits = torch.randn(5, 11)
    assert LOSSES[name](logits, logits + 3.0).abs().max() < 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_verifier_gets_no_gradient_and_peaks_stay_finite(name):
    draft = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    verifier = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    LOSSES[name](draft, verifier).sum().backward()
    assert verifier.grad is None
    assert draft.grad is not None and draft.grad.isfinite().all()


@given(st.lists(st.floats(-8, 8), min_size=12, max_size=12))
@settings(max_examples=50, deadline=None)
def test_divergences_keep_their_bounds(values):
    draft, verifier = torch.tensor(values).view(2, 1, 6)
    assert -1e-5 <= LOSSES["tv"](draft, verifier).item() <= 1 + 1e-5
    assert -1e-5 <= LOSSES["jsd"](draft, verifier).item() <= math.log(2) + 1e-5
    assert LOSSES["kl_div"](draft, verifier).item() >= -1e-5


def test_weighted_loss_is_the_weighted_sum():
    draft, verifier = torch.randn(2, 4, 7)
    expected = 0.1 * LOSSES["ce"](draft, verifier) + 0.9 * LOSSES["tv"](draft, verifier)
    assert torch.allclose(weighted_loss({"ce": 0.1, "tv": 0.9}, draft, verifier), expected)


def test_unknown_loss_is_named():
    with pytest.raises(SpeculatorError, match="unknown loss 'l2'; known: kl_div"):
        weighted_loss({"l2": 1.0}, torch.zeros(1, 2), torch.zeros(1, 2))
