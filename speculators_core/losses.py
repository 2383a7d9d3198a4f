"""How far a draft's distribution lies from the verifier's, row by row.

``draft`` and ``verifier`` are logits over the same vocabulary; p is the verifier's distribution and
q the draft's, both in float32. The verifier gets no gradient.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from speculators_core.errors import SpeculatorError

Logits = Float[Tensor, "*rows draft_vocab"]
Loss = Float[Tensor, "*rows"]

ACCEPTANCE_FLOOR = 1e-5
HYBRID_RATE = 3.0


def kl_div(draft: Logits, verifier: Logits) -> Loss:
    """KL(p || q)."""
    log_q, log_p = _log_softmax(draft), _log_softmax(verifier.detach())
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rkl(draft: Logits, verifier: Logits) -> Loss:
    """KL(q || p)."""
    log_q, log_p = _log_softmax(draft), _log_softmax(verifier.detach())
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(draft: Logits, verifier: Logits) -> Loss:
    """Jensen-Shannon divergence, at most log 2."""
    log_q, log_p = _log_softmax(draft), _log_softmax(verifier.detach())
    p, q = log_p.exp(), log_q.exp()
    log_mean = torch.log(0.5 * (p + q) + torch.finfo(p.dtype).tiny)
    return 0.5 * (p * (log_p - log_mean) + q * (log_q - log_mean)).sum(-1)


def ce(draft: Logits, verifier: Logits) -> Loss:
    """Cross-entropy against the verifier's most probable token."""
    return -_log_softmax(draft).gather(-1, verifier.argmax(-1, keepdim=True)).squeeze(-1)


def tv(draft: Logits, verifier: Logits) -> Loss:
    """Total variation, in [0, 1]: the chance that sampled verification rejects the token."""
    return 1.0 - _acceptance(draft, verifier)


def nla(draft: Logits, verifier: Logits) -> Loss:
    """Negative log of the chance of acceptance, which is bounded below."""
    return -_acceptance(draft, verifier).clamp_min(ACCEPTANCE_FLOOR).log()


def lk_hybrid(draft: Logits, verifier: Logits) -> Loss:
    """KL while the draft is far from the verifier, total variation once it is near."""
    share = torch.exp(-HYBRID_RATE * _acceptance(draft, verifier).detach())
    return share * kl_div(draft, verifier) + (1.0 - share) * tv(draft, verifier)


LOSSES: Mapping[str, Callable[[Logits, Logits], Loss]] = {
    loss.__name__: loss for loss in (kl_div, rkl, jsd, ce, tv, nla, lk_hybrid)
}


def weighted_loss(weights: Mapping[str, float], draft: Logits, verifier: Logits) -> Loss:
    """The sum of the named losses times their weights.

    Raises:
        SpeculatorError: a loss is unknown; the known ones are listed.
    """
    total = draft.new_zeros(draft.shape[:-1], dtype=torch.float32)
    for name, weight in weights.items():
        if name not in LOSSES:
            raise SpeculatorError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}.")
        total = total + weight * LOSSES[name](draft, verifier)
    return total


def _log_softmax(logits: Logits) -> Logits:
    return logits.float().log_softmax(-1)


def _acceptance(draft: Logits, verifier: Logits) -> Loss:
    """Sum of min(p, q): the chance that a token drawn from q is kept (arXiv:2211.17192)."""
    return torch.minimum(draft.float().softmax(-1), verifier.detach().float().softmax(-1)).sum(-1)
