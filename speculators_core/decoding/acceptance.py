"""Which proposed tokens the verifier accepts.

Pure functions on tensors. A draft of two tokens has three rows of the verifier, one more:

    draft            a      b
    verifier row     0      1      2      row t scores what may stand in the place of token t
    kept 0           x                    x comes from row 0, in place of a
    kept 1           a      x             x comes from row 1, in place of b
    kept 2           a      b      x      x comes from row 2: the bonus token

For sampled verification p is the verifier's distribution and q the one the draft was drawn from
(arXiv:2211.17192, arXiv:2302.01318). Both are final: temperature, top-k and top-p applied.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CONTEXT_BUCKETS = {
    "<128": 128,
    "128-512": 512,
    "512-2k": 2048,
    "2k-8k": 8192,
    "8k-32k": 32768,
    "32k+": math.inf,
}
"""Ranges of context lengths in tokens, each with the length that ends it."""
ENOUGH_DRAFTS = 50
"""Fewest drafts from which a rate is stated as a finding."""


def context_of(num_tokens: int) -> str:
    """The range of `CONTEXT_BUCKETS` that so many tokens before a draft are in."""
    return next(name for name, end in CONTEXT_BUCKETS.items() if num_tokens < end)


class Cell(NamedTuple):
    """Drafts in one range of context lengths that reached one position."""

    context: str
    position: int
    """Position in the draft, from 1."""
    num_drafts: int
    """Drafts whose earlier positions were all kept."""
    num_kept: int

    @property
    def rate(self) -> float:
        """Conditional rate."""
        return self.num_kept / self.num_drafts

    def __str__(self) -> str:
        return (
            f"position {self.position} with {self.context} tokens of context, "
            f"{self.num_kept} of {self.num_drafts} kept ({self.rate:.2f})"
        )


def worst_cell(contexts: Mapping[str, Iterable[tuple[int, int]]]) -> Cell | None:
    """The cell with the lowest conditional rate; of equal ones, that with more drafts.

    ``contexts`` has, for each range and position, the drafts that reached it and those kept there.
    None where no cell has `ENOUGH_DRAFTS`.
    """
    cells = [
        Cell(context, position, reached, kept)
        for context, counts in contexts.items()
        for position, (reached, kept) in enumerate(counts, start=1)
        if reached >= ENOUGH_DRAFTS
    ]
    return min(cells, key=lambda cell: (cell.rate, -cell.num_drafts), default=None)


def reached_and_kept(
    num_drafts: int, accepted_per_position: Sequence[int]
) -> list[tuple[int, int]]:
    """For each position, the drafts that reached it and those kept there.

    10 drafts, kept [7 3] -> (10, 7) (7, 3)
    """
    kept_to = [num_drafts, *accepted_per_position]
    return list(zip(kept_to, accepted_per_position, strict=False))


@dataclass(frozen=True)
class Acceptance:
    """The result of one verifier step, for each row of a batch."""

    num_accepted: Int[Tensor, "batch"]
    next_token: Int[Tensor, "batch"]
    """The token after the kept ones: in place of the first refused one, or the bonus token."""


def accept_greedy(
    draft_tokens: Int[Tensor, "batch draft"],
    verifier_scores: Float[Tensor, "batch draft+1 vocab"],
    accept_k: int = 1,
    tolerance: float = 0.0,
) -> Acceptance:
    """Length of the draft's prefix that the verifier agrees with, and the verifier's next token.

    draft [7 3 9 2], verifier [7 3 5 2 8] -> 2 kept, next is 5

    By default a token is kept only where it is argmax's choice, among equals too, so the output
    equals the verifier's. It is lossy to keep more: a token that fewer than ``accept_k`` tokens
    outscore, or one within ``tolerance`` of the best score. A score of -inf is never kept so.
    """
    verifier_tokens = verifier_scores.argmax(-1)  # [batch, draft + 1]
    kept = draft_tokens == verifier_tokens[:, :-1]
    if accept_k > 1 or tolerance > 0.0:
        scores = verifier_scores[:, :-1]
        own = _of_tokens(scores, draft_tokens)  # [batch, draft]
        rank = (scores > own[..., None]).sum(-1)
        gap = scores.amax(-1).double() - own.double()  # bf16 would round the gap
        kept |= ((rank < accept_k) | (gap <= tolerance)) & (own > -torch.inf)
    num_accepted = _count_leading(kept)
    next_token = verifier_tokens.gather(1, num_accepted[:, None]).squeeze(1)
    return Acceptance(num_accepted, next_token)


def accept_sampled(
    draft_tokens: Int[Tensor, "batch draft"],
    draft_probs: Float[Tensor, "batch draft vocab"] | None,
    verifier_probs: Float[Tensor, "batch draft+1 vocab"],
    generator: torch.Generator | None = None,
) -> Acceptance:
    """Keeps and replaces by chance so that the emitted tokens follow the verifier's law.

    Draft tokens are either drawn from their rows of ``draft_probs`` or, where that is None, chosen
    in any way at all (greedily, say). Probabilities that the tokens were not drawn from break the
    law. A token to which the verifier gives no probability is never emitted. ``generator`` lives on
    the tensors' device.
    """
    chance = acceptance_probability(draft_tokens, draft_probs, verifier_probs)
    # Uniform draws include 0, never 1: a strict < refuses chance 0 and keeps chance 1 always.
    uniform = torch.rand(
        chance.shape, dtype=chance.dtype, device=chance.device, generator=generator
    )
    num_accepted = _count_leading(uniform < chance)
    law = next_token_probs(draft_tokens, draft_probs, verifier_probs, num_accepted)
    return Acceptance(num_accepted, _draw(law, generator))


def acceptance_probability(
    draft_tokens: Int[Tensor, "batch draft"],
    draft_probs: Float[Tensor, "batch draft vocab"] | None,
    verifier_probs: Float[Tensor, "batch draft+1 vocab"],
) -> Float[Tensor, "batch draft"]:
    """min(1, p / q) of each draft token: its chance of being kept once those before it are.

    Without ``draft_probs`` q is 1. A token with q = 0 cannot have been drawn; one that comes
    nevertheless is kept where p > 0. Float64: float32's uniform draws are multiples of 2**-24 and
    would keep a token with p / q = 1e-9 sixty times too often.
    """
    p = _of_tokens(verifier_probs[:, :-1], draft_tokens).double()
    q = torch.ones_like(p) if draft_probs is None else _of_tokens(draft_probs, draft_tokens)
    return torch.where(p > 0.0, p / q, 0.0).clamp_max(1.0)  # [batch, draft]


def next_token_probs(
    draft_tokens: Int[Tensor, "batch draft"],
    draft_probs: Float[Tensor, "batch draft vocab"] | None,
    verifier_probs: Float[Tensor, "batch draft+1 vocab"],
    num_accepted: Int[Tensor, "batch"],
) -> Float[Tensor, "batch vocab"]:
    """Law of the token that follows ``num_accepted`` kept ones, in float64.

    After a refusal max(p - q, 0) scaled to sum to 1, or p where rounding leaves that no mass; after
    a draft that was kept whole p.

    p [.5 .3 .2], q [.2 .2 .6] -> after a refusal [.75 .25 0]
    """
    if draft_probs is None:
        nothing = torch.zeros_like(verifier_probs[:, :-1])
        draft_probs = nothing.scatter(-1, draft_tokens.long()[..., None], 1.0)
    batch = torch.arange(len(num_accepted), device=num_accepted.device)
    q = torch.nn.functional.pad(draft_probs, (0, 0, 0, 1))  # [batch, draft + 1, vocab]
    p, q = verifier_probs[batch, num_accepted].double(), q[batch, num_accepted].double()
    mass = (p - q).clamp_min(0.0)  # [batch, vocab]
    mass = torch.where(mass.sum(-1, keepdim=True) > 0.0, mass, p)
    return mass / mass.sum(-1, keepdim=True)


def _of_tokens(
    values: Float[Tensor, "batch draft vocab"], tokens: Int[Tensor, "batch draft"]
) -> Float[Tensor, "batch draft"]:
    return values.gather(-1, tokens.long()[..., None]).squeeze(-1)


def _count_leading(kept: Bool[Tensor, "batch draft"]) -> Int[Tensor, "batch"]:
    return kept.long().cumprod(-1).sum(-1)


def _draw(
    probs: Float[Tensor, "batch vocab"], generator: torch.Generator | None
) -> Int[Tensor, "batch"]:
    """One token a row, never one without probability.

    Token i arrives after a time Exp(1) / probs[i] and the first one wins. `torch.multinomial` draws
    the same race, but a time of exactly 0 would let a token without probability win it as 0 / 0.
    """
    times = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / times.clamp_min(torch.finfo(probs.dtype).tiny)).argmax(-1)


@dataclass(frozen=True)
class AcceptanceCounts:
    """How many tokens of each draft were kept, in order."""

    speculative_tokens: int
    accepted: list[int] = field(default_factory=list)

    @property
    def num_drafts(self) -> int:
        return len(self.accepted)

    @property
    def accepted_per_position(self) -> list[int]:
        """Drafts whose positions 1 to k were all kept, for each k."""
        positions = range(1, self.speculative_tokens + 1)
        return [sum(count >= k for count in self.accepted) for k in positions]

    @property
    def acceptance_length(self) -> float:
        """Tokens per verifier step, the bonus token included; 1 where nothing was drafted."""
        return 1.0 + sum(self.accepted) / max(1, self.num_drafts)

    def by_context(self, num_prompt_tokens: int) -> "dict[str, AcceptanceCounts]":
        """The drafts of one text by the number of tokens before them; ranges without drafts are
        absent.

        prompt of 125 tokens, kept [1 0 2] -> contexts 126 128 129 -> <128: [1], 128-512: [0 2]

        The first token is the verifier's. Where a step had no draft (prompt lookup without a
        match), later drafts had one more token before them than is counted here.
        """
        found: dict[str, AcceptanceCounts] = {}
        context = num_prompt_tokens + 1
        for kept in self.accepted:
            counts = found.setdefault(
                context_of(context), AcceptanceCounts(self.speculative_tokens)
            )
            counts.accepted.append(kept)
            context += kept + 1
        return found


def merge_contexts(
    parts: Iterable[Mapping[str, AcceptanceCounts]], speculative_tokens: int
) -> dict[str, AcceptanceCounts]:
    """The drafts of several texts by context length, in the order of `CONTEXT_BUCKETS`."""
    found = {name: AcceptanceCounts(speculative_tokens) for name in CONTEXT_BUCKETS}
    for part in parts:
        for name, counts in part.items():
            found[name].accepted.extend(counts.accepted)
    return {name: counts for name, counts in found.items() if counts.accepted}
