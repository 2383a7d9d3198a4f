"""The records between the decoding loop and a draft."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Confirmed:
    """The tokens that the verifier confirmed since the last proposal.

    Rows of a batch are aligned to the right: where a row has fewer new tokens than another, it
    begins with padding.

        text so far     x0 x1 x2 x3 | x4 x5 x6      the verifier has run over all but x6
        token_ids       x3 x4 x5 x6
        positions        3  4  5                    of the tokens with a state
        hidden_states   g3 g4 g5
    """

    token_ids: Int[Tensor, "batch new_plus_one"]
    """Tokens with a state, and the bonus token after them, which has none yet."""
    positions: Int[Tensor, "batch new"]
    """Place in the text of each token with a state, from 0; `PADDING` before a row begins."""
    hidden_states: Float[Tensor, "batch new aux_hidden"]
    """The verifier's states at the draft's `aux_layer_ids`, side by side."""


@dataclass(frozen=True)
class Proposal:
    """The tokens that a draft proposes, as ids of the verifier."""

    token_ids: Int[Tensor, "batch draft"]
    probs: Float[Tensor, "batch draft vocab"] | None = None
    """The distribution that they were drawn from, over the verifier's vocabulary; None if none."""
    num_proposed: Int[Tensor, "batch"] | None = None
    """Tokens of each row that are proposals, before filling; all of them where None."""


@dataclass(frozen=True)
class Chooser:
    """Turns a draft's logits into tokens: the best one, or one drawn at a temperature."""

    temperature: float | None = None
    """Greedy where None."""
    generator: torch.Generator | None = None

    def __call__(
        self,
        logits: Float[Tensor, "batch tokens draft_vocab"],
        token_ids: Int[Tensor, "draft_vocab"] | None = None,
        vocab_size: int | None = None,
    ) -> Proposal:
        """A token for each place; ``token_ids`` are the verifier's ids of a reduced vocabulary."""
        if self.temperature is None:
            chosen, probs = logits.argmax(-1), None
        else:
            probs = (logits.float() / self.temperature).softmax(-1)
            flat = torch.multinomial(probs.flatten(0, 1), 1, generator=self.generator)
            chosen = flat.view(logits.shape[:-1])
        if token_ids is not None:
            chosen = token_ids[chosen]
            if probs is not None:
                whole = probs.new_zeros((*probs.shape[:-1], vocab_size or int(token_ids.max()) + 1))
                whole[..., token_ids] = probs
                probs = whole
        return Proposal(chosen, probs)


def join(proposals: list[Proposal]) -> Proposal:
    """Proposals of one token after another as one."""
    probs = [p.probs for p in proposals if p.probs is not None]
    return Proposal(
        torch.cat([p.token_ids for p in proposals], dim=1),
        torch.cat(probs, dim=1) if probs else None,
    )


@runtime_checkable  # for the checks of tests
class DraftState(Protocol):
    """The state that a draft keeps from one proposal to the next."""

    def select_rows(self, rows: Int[Tensor, "rows"]) -> None:
        """Keeps these rows of the batch alone."""


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens: a speculator, a language model, or prompt lookup."""

    device: torch.device
    dtype: torch.dtype

    @property
    def aux_layer_ids(self) -> list[int]:
        """Layers of the verifier whose states it reads, ascending."""

    def start_drafting(self) -> DraftState:
        """The state for a new batch of texts."""

    def propose(
        self, state: Any, confirmed: Confirmed, num_tokens: int, choose: Chooser
    ) -> Proposal:
        """The next tokens after the bonus token of each row."""
