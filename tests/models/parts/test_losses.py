import math
import weakref
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speculators_core.errors import SpeculatorError
from speculators_core.models.parts import losses
from speculators_core.models.parts.losses import LOSSES, score_rows, weighted_loss
from speculators_core.settings import Settings
from speculators_core.verifier import head as verifier_head

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
    with pytest.raises(SpeculatorError, match="unknown loss 'l2'; expected one of kl_div"):
        weighted_loss({"l2": 1.0}, torch.zeros(1, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_the_formulas(name):
    """By hand, with respect to the draft's logits; the acceptance in lk_hybrid's share is fixed."""
    below = (Q <= P).float()
    tv_gradient = -Q * (below - (Q * below).sum())
    kl_gradient = Q - P
    log_ratio = (Q / M).log()
    expected = {
        "kl_div": kl_gradient,
        "rkl": Q * ((Q / P).log() - EXPECTED["rkl"]),
        "jsd": 0.5 * Q * (log_ratio - (Q * log_ratio).sum()),
        "ce": Q - torch.tensor([1.0, 0.0, 0.0]),
        "tv": tv_gradient,
        "nla": tv_gradient / ACCEPTANCE,
        "lk_hybrid": math.exp(-3 * ACCEPTANCE) * kl_gradient
        + (1 - math.exp(-3 * ACCEPTANCE)) * tv_gradient,
    }
    # Token 1 has p = q, where min(p, q) has a kink: a hair less of it takes the side of q <= p.
    draft = (Q * torch.tensor([1.0, 1 - 1e-5, 1.0])).log()[None].requires_grad_()
    LOSSES[name](draft, P.log()[None]).sum().backward()
    assert draft.grad is not None
    assert (draft.grad[0] - expected[name]).abs().max() < 1e-4


# ---- weights from a config ----


class Weights(Settings):
    loss: losses.LossWeights = {"kl_div": 1.0}


def test_name_of_a_loss_stands_for_it_alone():
    assert Weights.read({"loss": "tv"}, "here").loss == {"tv": 1.0}
    assert Weights.read({"loss": {"ce": 0.1, "tv": 0.9}}, "here").loss == {"ce": 0.1, "tv": 0.9}
    assert Weights().loss == {"kl_div": 1.0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("l2", "unknown loss 'l2'; expected one of kl_div"),
        ({"ce": 0.5, "l2": 0.5}, "unknown loss 'l2'; expected one of kl_div"),
        ({}, "at least 1 item"),
        ({"ce": "much"}, "loss"),
        (3, "loss"),
    ],
)
def test_bad_weights_are_named(value, message):
    with pytest.raises(SpeculatorError, match=message):
        Weights.read({"loss": value}, "here")


# ---- rows by the thousand ----

HIDDEN, VOCAB, NUM_TARGETS = 6, 24, 30
MIXTURE = {"ce": 0.1, "tv": 0.9}
CLOSED = {"kl_div": 0.7, "ce": 0.5}


class Rows:
    """Rows to score, the verifier's logits, and how many of them were asked for at a time."""

    def __init__(self, num_rows, is_reduced, seed=0, vocab_size=VOCAB):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.arange(vocab_size)
        self.ids = ids[1::2] if is_reduced else None

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        self.hidden = normal(num_rows, HIDDEN).requires_grad_()
        self.head = normal(len(ids if self.ids is None else self.ids), HIDDEN)
        self.table = 2 * normal(NUM_TARGETS, vocab_size)
        self.targets = torch.randint(NUM_TARGETS, (num_rows,), generator=generator)
        self.asked: list[int] = []

    def verifier_logits(self, rows):
        self.asked.append(len(rows))
        return self.table[rows]

    def score(self, loss):
        return score_rows(
            self.hidden, self.head, self.verifier_logits, self.targets, loss, self.ids
        )

    def plainly(self, loss):
        """The same with all logits at once: losses, tokens, right ones, covered ones."""
        verifier = self.table[self.targets]
        best = verifier.argmax(-1)
        ids = torch.arange(self.table.shape[1]) if self.ids is None else self.ids
        is_covered = (best[:, None] == ids).any(-1)
        logits = self.hidden @ self.head.T
        row_losses = sum(
            weight * LOSSES[name](logits, verifier[:, ids]) for name, weight in loss.items()
        )
        tokens = logits.argmax(-1)
        return row_losses * is_covered, tokens, ids[tokens] == best, is_covered


@pytest.mark.parametrize("loss", [*({name: 1.0} for name in LOSSES), MIXTURE, CLOSED], ids=str)
@given(
    st.integers(0, 40),
    st.integers(1, 45),
    st.integers(1, 45),
    st.booleans(),
    st.integers(0, 2**16),
)
@settings(max_examples=50, deadline=None)
def test_scores_in_chunks_equal_the_plain_ones(loss, num_rows, chunk, few, is_reduced, seed):
    rows = Rows(num_rows, is_reduced, seed)
    cotangent = torch.linspace(-1.0, 2.0, num_rows)
    plain, tokens, is_right, is_covered = rows.plainly(loss)
    (wanted,) = torch.autograd.grad(plain, rows.hidden, cotangent)
    chunk_logits = chunk * len(rows.head)
    cached_logits = few * len(rows.head)
    with (
        mock.patch.multiple(verifier_head, FEWEST_ROWS=1, CHUNK_LOGITS=chunk_logits),
        mock.patch.object(losses, "CACHED_LOGITS", cached_logits),
    ):
        scored = rows.score(loss)
        (found,) = torch.autograd.grad(scored.losses, rows.hidden, cotangent)
    assert torch.allclose(scored.losses, plain, atol=1e-5)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.equal(scored.draft_tokens, tokens)
    assert torch.equal(scored.is_right, is_right)
    assert torch.equal(scored.is_covered, is_covered)
    asked = rows.targets.sort().values.split(chunk)
    assert rows.asked == [len(targets.unique()) for targets in asked]


def test_chunks_shrink_as_the_vocabulary_grows_but_not_to_nothing(monkeypatch):
    monkeypatch.setattr(verifier_head, "CHUNK_LOGITS", 20 * VOCAB)
    rows = Rows(50, is_reduced=False)
    rows.targets, rows.table = torch.arange(50), rows.table.repeat(2, 1)
    rows.score({"ce": 1.0})
    assert rows.asked == [20, 20, 10]
    monkeypatch.setattr(verifier_head, "CHUNK_LOGITS", 1)
    rows.asked.clear()
    rows.score({"ce": 1.0})
    assert rows.asked == [verifier_head.FEWEST_ROWS] * 3 + [50 % verifier_head.FEWEST_ROWS]


def test_rows_with_the_same_target_share_the_verifiers_logits():
    rows = Rows(90, is_reduced=False)
    rows.targets = torch.arange(30).repeat(3)
    rows.score({"kl_div": 1.0})
    assert rows.asked == [30]


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_tokens_for_certain_are_learnt_by_cross_entropy(weight):
    rows = Rows(40, is_reduced=False)
    tokens = torch.arange(NUM_TARGETS) % VOCAB
    scored = score_rows(rows.hidden, rows.head, tokens, rows.targets, {"ce": weight})
    logits, wanted = rows.hidden @ rows.head.T, tokens[rows.targets]
    plain = weight * torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    assert torch.allclose(scored.losses, plain, atol=1e-5)
    (found,) = torch.autograd.grad(scored.losses.sum(), rows.hidden)
    (expected,) = torch.autograd.grad(plain.sum(), rows.hidden)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(scored.is_right, logits.argmax(-1) == wanted)
    assert scored.is_covered.all()


@pytest.mark.parametrize("name", LOSSES)
def test_rows_outside_the_vocabulary_teach_nothing_and_count_as_wrong(name):
    rows = Rows(40, is_reduced=True)
    best = rows.table[rows.targets].argmax(-1)
    outside = ~torch.isin(best, rows.ids)
    assert 5 < outside.sum() < 35
    scored = rows.score({name: 1.0})
    (gradient,) = torch.autograd.grad(scored.losses.sum(), rows.hidden)
    assert torch.equal(scored.is_covered, ~outside)
    assert not scored.is_right[outside].any()
    assert (scored.losses[outside] == 0).all() and (gradient[outside] == 0).all()
    assert (gradient[~outside].abs().sum(-1) > 0).all()


def test_whole_vocabulary_covers_every_row():
    assert Rows(20, is_reduced=False).score({"tv": 1.0}).is_covered.all()


def test_evaluation_scores_the_same_and_makes_no_gradient():
    rows = Rows(20, is_reduced=True)
    trained = rows.score(MIXTURE)
    with torch.no_grad():
        evaluated = rows.score(MIXTURE)
    assert torch.equal(trained.losses, evaluated.losses) and not evaluated.losses.requires_grad


def test_gradient_has_the_type_of_the_states():
    rows = Rows(20, is_reduced=False)
    half = rows.hidden.detach().bfloat16().requires_grad_()
    rows.head = rows.head.bfloat16()
    rows.hidden, exact = half, rows.hidden
    scored = rows.score({"kl_div": 1.0})
    scored.losses.mean().backward()
    assert scored.losses.dtype == torch.float32
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    rows.hidden, rows.head = exact, rows.head.float()
    (wanted,) = torch.autograd.grad(rows.plainly({"kl_div": 1.0})[0].mean(), exact)
    assert (half.grad - wanted).abs().max() < 0.05 * wanted.abs().max()


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still held, and the most of them."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.sizes:
                    self.sizes[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def peak_bytes_per_row(is_reduced, score):
    """How the most memory held while rows are scored and taught grows with their number."""
    peaks = []
    for num_rows in (400, 800):
        rows = Rows(num_rows, is_reduced, vocab_size=512)
        with LiveMemory() as memory:
            score(rows).sum().backward()
        peaks.append(memory.peak)
    return (peaks[1] - peaks[0]) / 400


@pytest.mark.parametrize("is_reduced", [False, True])
def test_logits_of_a_whole_row_never_exist_together(monkeypatch, is_reduced):
    monkeypatch.setattr(verifier_head, "CHUNK_LOGITS", 1)
    plain = peak_bytes_per_row(is_reduced, lambda rows: rows.plainly({"jsd": 1.0})[0])
    chunked = peak_bytes_per_row(is_reduced, lambda rows: rows.score({"jsd": 1.0}).losses)
    assert plain > 4 * 512  # a row of float32 logits, at least
    assert chunked < 4 * 64  # states, gradients and results


def test_head_that_trains_is_not_ours():
    rows = Rows(3, is_reduced=False)
    rows.head.requires_grad_()
    with pytest.raises(AssertionError, match="frozen"):
        rows.score({"ce": 1.0})
