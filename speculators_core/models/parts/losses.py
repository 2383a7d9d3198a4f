"""Distances between the draft's distribution and the verifier's.

``draft`` and ``verifier`` are logits over the same vocabulary; p is the verifier's distribution and
q the draft's, both in float32. The verifier gets no gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from speculators_core.errors import SpeculatorError
from speculators_core.verifier.head import VerifierLogits, rows_at_once

Logits = Float[Tensor, "*rows draft_vocab"]
Loss = Float[Tensor, "*rows"]

ACCEPTANCE_FLOOR = 1e-5
HYBRID_RATE = 3.0
MASK_SUM_FLOOR = 1e-5
"""Keeps a mean over no rows finite."""


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


def _loss_weights(value: object) -> object:
    """The name of one loss stands for that loss alone; every name must be known."""
    weights = {value: 1.0} if isinstance(value, str) else value
    if isinstance(weights, Mapping):
        if unknown := [name for name in weights if name not in LOSSES]:
            raise ValueError(f"unknown loss {unknown[0]!r}; expected one of {', '.join(LOSSES)}")
    return weights


LossWeights = Annotated[Mapping[str, float], BeforeValidator(_loss_weights), Field(min_length=1)]
"""Weights of losses by name, or the name of one."""


def weighted_loss(weights: Mapping[str, float], draft: Logits, verifier: Logits) -> Loss:
    """The sum of the named losses times their weights.

    Raises:
        SpeculatorError: a loss is unknown; the known ones are listed.
    """
    total = draft.new_zeros(draft.shape[:-1], dtype=torch.float32)
    for name, weight in weights.items():
        if name not in LOSSES:
            raise SpeculatorError(
                f"unknown loss {name!r}; expected one of {', '.join(LOSSES)}. Correct its name."
            )
        total = total + weight * LOSSES[name](draft, verifier)
    return total


def _log_softmax(logits: Logits) -> Logits:
    return logits.float().log_softmax(-1)


def _acceptance(draft: Logits, verifier: Logits) -> Loss:
    """Sum of min(p, q): the chance that a token drawn from q is kept (arXiv:2211.17192)."""
    return torch.minimum(draft.float().softmax(-1), verifier.detach().float().softmax(-1)).sum(-1)


# ---- rows by the thousand ----


@dataclass(frozen=True)
class ScoredRows:
    """Losses and tokens of each row that a draft was trained on."""

    losses: Float[Tensor, "rows"]
    """Zero where the verifier's token is outside the draft's vocabulary."""
    draft_tokens: Int[Tensor, "rows"]
    """The draft's most probable token, as an id of the draft's vocabulary."""
    is_right: Bool[Tensor, "rows"]
    """It is the verifier's most probable token of the whole vocabulary."""
    is_covered: Bool[Tensor, "rows"]
    """The verifier's token is in the draft's vocabulary."""

    def split(self, counts: Sequence[int]) -> list["ScoredRows"]:
        """So many rows each, in order."""
        tensors = (getattr(self, field.name).split(counts) for field in fields(self))
        return [ScoredRows(*parts) for parts in zip(*tensors, strict=True)]


Targets = VerifierLogits | Int[Tensor, "seq"]
"""What each row of a text should learn: the verifier's logits there, or a token for certain."""
CLOSED = frozenset({"kl_div", "ce"})
"""Losses whose slope is a sum of distributions, so that nothing need be kept to differentiate."""
CACHED_LOGITS = 2**18
"""Logits that are worked on at one time on a CPU: what a core's cache holds."""


def score_rows(
    hidden: Float[Tensor, "rows hidden"],
    head_weight: Float[Tensor, "draft_vocab hidden"],
    targets: Targets,
    target_rows: Int[Tensor, "rows"],
    loss: Mapping[str, float],
    draft_token_ids: Int[Tensor, "draft_vocab"] | None = None,
) -> ScoredRows:
    """Each row's loss against the verifier's distribution in its target row.

    Logits are made for some rows at a time, and each row's gradient with them, so those of a whole
    packed row never exist together. The verifier's are made once for all rows with the same target:
    score the steps of an unroll in one call. Over a reduced vocabulary they are those of
    ``draft_token_ids``. Where its best token is not among them the draft cannot be right, and
    the rest of the distribution does not help: the row counts as wrong and has no loss.

    With tokens as ``targets`` the loss is their cross-entropy, and ``loss`` its weight.
    """
    assert not head_weight.requires_grad, "the head of a draft is its verifier's, and frozen"
    results = _ScoreRows.apply(hidden, head_weight, targets, target_rows, loss, draft_token_ids)
    return ScoredRows(*results)


class _ScoreRows(torch.autograd.Function):
    """Keeps the gradient of each row's loss by its hidden state, which backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Targets,
        target_rows: Tensor,
        loss: Mapping[str, float],
        draft_token_ids: Tensor | None,
    ) -> tuple[Tensor, ...]:
        num_rows = len(hidden)
        losses = hidden.new_zeros(num_rows, dtype=torch.float32)
        draft_tokens = torch.zeros_like(target_rows)
        is_right = torch.zeros_like(target_rows, dtype=torch.bool)
        is_covered = torch.ones_like(is_right)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden) if needs_gradient else None
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):  # which would cast a frozen weight for every chunk
            head_weight = head_weight.to(torch.get_autocast_dtype(kind))
        chunk = rows_at_once(len(head_weight), hidden.device)
        for rows in target_rows.argsort(stable=True).split(chunk):
            aims = _Aims.read(targets, target_rows[rows], draft_token_ids, hidden.device)
            logits = nn.functional.linear(hidden[rows], head_weight)  # [rows, draft_vocab]
            chosen = torch.zeros_like(rows)
            row_losses = torch.empty_like(losses[rows])
            few = len(rows) if kind != "cpu" else max(1, CACHED_LOGITS // logits.shape[1])
            for first in range(0, len(rows), few):
                part = slice(first, first + few)
                chosen[part], row_losses[part], slopes = _slopes(
                    loss, logits[part], aims[part], needs_gradient
                )
                if slopes is not None:
                    logits[part] = slopes
            if gradient is not None:
                by_hidden = logits @ head_weight
                gradient[rows] = by_hidden.to(gradient.dtype) * aims.is_covered[:, None]
            losses[rows] = row_losses * aims.is_covered
            draft_tokens[rows] = chosen
            token_ids = chosen if draft_token_ids is None else draft_token_ids[chosen]
            is_right[rows] = token_ids == aims.best
            is_covered[rows] = aims.is_covered
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(draft_tokens, is_right, is_covered)
        return losses, draft_tokens, is_right, is_covered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None, None, None, None


@dataclass(frozen=True)
class _Aims:
    """What some rows should learn."""

    best: Int[Tensor, "rows"]
    """The token to say, as an id of the verifier's vocabulary."""
    is_covered: Bool[Tensor, "rows"]
    distribution: "_Distribution | None"
    """None where ``best`` is certain."""
    which: Int[Tensor, "rows"]
    """The distribution's row for each row."""

    @classmethod
    def read(
        cls,
        targets: Targets,
        rows: Int[Tensor, "rows"],
        draft_token_ids: Tensor | None,
        device: torch.device,
    ) -> "_Aims":
        if isinstance(targets, Tensor):
            best = targets[rows]
            return cls(best, torch.ones_like(best, dtype=torch.bool), None, best)
        unique, which = rows.unique_consecutive(return_inverse=True)
        logits = targets(unique).detach().to(device)  # [unique, vocab]
        best = logits.argmax(-1)
        is_covered = torch.ones_like(best, dtype=torch.bool)
        if draft_token_ids is not None:
            is_covered = torch.isin(best, draft_token_ids)
            logits = logits[:, draft_token_ids]
        return cls(best[which], is_covered[which], _Distribution(logits), which)

    def __getitem__(self, rows: slice) -> "_Aims":
        return _Aims(self.best[rows], self.is_covered[rows], self.distribution, self.which[rows])


@dataclass(frozen=True)
class _Distribution:
    """The verifier's distributions over the draft's vocabulary."""

    logits: Logits

    @cached_property
    def shares(self) -> Logits:
        return self.logits.float().softmax(-1)

    @cached_property
    def information(self) -> Loss:
        """Sum of p log p."""
        logs = self.logits.float().log_softmax(-1)
        return torch.linalg.vecdot(self.shares, logs)

    @cached_property
    def best(self) -> Int[Tensor, "rows"]:
        return self.logits.argmax(-1)


def _slopes(
    weights: Mapping[str, float], logits: Logits, aims: _Aims, needs_gradient: bool
) -> tuple[Int[Tensor, "rows"], Loss, Logits | None]:
    """The draft's most probable token, each row's loss, and its derivative by each logit."""
    chosen = logits.argmax(-1)
    aim = aims.distribution
    if aim is not None and not CLOSED.issuperset(weights):
        with torch.set_grad_enabled(needs_gradient):
            leaf = logits.detach().requires_grad_(needs_gradient)
            losses = weighted_loss(weights, leaf, aim.logits[aims.which])
        if not needs_gradient:
            return chosen, losses, None
        (slopes,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
        return chosen, losses.detach(), slopes
    kl, ce = weights.get("kl_div", 0.0), weights.get("ce", 0.0)
    logits = logits.float()
    shares = logits.softmax(-1)
    top = logits.gather(-1, chosen[:, None]) - shares.gather(-1, chosen[:, None]).log()
    losses = (kl + ce) * top[:, 0]  # the logarithm of the sum of exponents
    if kl and aim is not None:
        wanted = aim.shares[aims.which]
        losses += kl * (aim.information[aims.which] - torch.linalg.vecdot(wanted, logits))
    if ce:
        best = aims.best if aim is None else aim.best[aims.which]
        losses -= ce * logits.gather(-1, best[:, None])[:, 0]
    if not needs_gradient:
        return chosen, losses, None
    if kl + ce != 1.0:
        shares *= kl + ce
    if kl and aim is not None:
        shares.sub_(wanted, alpha=kl)
    if ce:
        shares.scatter_add_(-1, best[:, None], torch.full_like(top, -ce))
    return chosen, losses, shares
