"""Predicts how much of a draft is kept, from texts whose verifier states are known.

No verifier is run. From a place of a text the draft proposes its tokens as it is served, each on
its own output. A token is right if it is what the verifier says next, which is known for as long as
the text itself goes the way of the draft:

    text                x0 x1 x2 x3 x4        the verifier after    x1: x2   x2: x3   x3: y
    drafted after x1          x2 x3 y  z      right, right, right; then the text goes on with x4
                                              and what the verifier says after y is unknown

So z is *censored*: neither right nor wrong. The rate at a position is taken over the drafts that
came to it (*at risk*), and the rates multiply (Kaplan and Meier 1958). Drafts are made where a
decoder makes them, each where the one before has ended: at every place alike, the easy stretches
that a decoder passes in one long draft would count most.

Over the verifier's own greedy answers it is what decoding them gives, but for their ends. Of a text
that the verifier did not write, later positions are seen only where it would have written the same.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speculators_core.decoding.acceptance import AcceptanceCounts
from speculators_core.decoding.drafter import Chooser, Drafter
from speculators_core.diagnosis.replay import Stepper

UNKNOWN = -1
"""In place of a token that nobody has asked the verifier for."""
DRAFTS_OF_TEXT = 32
"""A few long ways tell less than more of this length."""


@dataclass(frozen=True)
class SurvivalCounts:
    """How far drafts came, position by position."""

    at_risk: tuple[int, ...]
    """Drafts that came to position k: right before it, and the verifier's token is known there."""
    right: tuple[int, ...]
    """Those of them that had the verifier's token."""

    @classmethod
    def none(cls, num_tokens: int) -> "SurvivalCounts":
        return cls((0,) * num_tokens, (0,) * num_tokens)

    @classmethod
    def of(cls, counts: AcceptanceCounts) -> "SurvivalCounts":
        """Of drafts that were verified whole."""
        kept_to = (counts.num_drafts, *counts.accepted_per_position)
        return cls(kept_to[:-1], kept_to[1:])

    def __add__(self, other: "SurvivalCounts") -> "SurvivalCounts":
        """The drafts of both together."""
        both = ((self.at_risk, other.at_risk), (self.right, other.right))
        at_risk, right = (tuple(map(sum, zip(a, b, strict=True))) for a, b in both)
        return SurvivalCounts(at_risk, right)

    @property
    def num_places(self) -> int:
        """Drafts in all: each comes to its first position."""
        return self.at_risk[0]

    @property
    def conditional(self) -> tuple[float | None, ...]:
        """Share right at position k of those that came to it; None where none did."""
        counts = zip(self.right, self.at_risk, strict=True)
        return tuple(right / at_risk if at_risk else None for right, at_risk in counts)

    @property
    def joint(self) -> tuple[float, ...]:
        """Chance that positions 1 to k are all kept; 0 from where no draft came to."""
        return tuple(accumulate((rate or 0.0 for rate in self.conditional), mul))

    @property
    def acceptance_length(self) -> float:
        """Tokens per verifier step, the bonus token included; 1 where there was no draft.

        Too low by what lies behind a position that every draft was censored before.
        """
        return 1.0 + sum(self.joint)


@dataclass(frozen=True)
class VerifiedText:
    """A text, and what the verifier thinks of it; row t is token t, nothing is shifted."""

    token_ids: Int[Tensor, "seq"]
    states: Float[Tensor, "seq aux_hidden"]
    """At the draft's `aux_layer_ids`, side by side."""
    choices: Int[Tensor, "seq"]
    """The verifier's greedy token after each one; `UNKNOWN` where no place asks for it."""


def bonus_places(loss_mask: Bool[Tensor, "seq"]) -> Int[Tensor, "places"]:
    """Places whose token the verifier would have said last when it is served, and says one more.

    The first token of an answer is one, as it comes from prefill; the end of a turn is none.

    loss mask 0 0 1 1 1 0 0 1 1 -> 2 3 7
    """
    places = (loss_mask[:-1] & loss_mask[1:]).nonzero().flatten()
    return places[places > 0]


def share_drafts(num_places: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """How many drafts, at most, are made in each text, ``count`` in all.

    Texts are taken in an order that the seed draws, those that have a place; each for
    `DRAFTS_OF_TEXT`, or more where that leaves some over.
    """
    texts = [text for text, places in enumerate(num_places) if places]
    random.Random(seed).shuffle(texts)
    each = max(DRAFTS_OF_TEXT, -(-count // max(1, len(texts))))
    shares = [0] * len(num_places)
    for text in texts:
        shares[text] = min(each, count)
        count -= shares[text]
    return shares


def reachable_positions(
    places: Sequence[int], num_drafts: int, num_tokens: int, length: int
) -> tuple[list[int], list[int]]:
    """The places that so many drafts can come to in a text of ``length`` tokens, and the rows of
    `VerifiedText.choices` that they are held against."""
    end = places[0] + num_drafts * (num_tokens + 1)
    reached = [place for place in places if place < end]
    return reached, list(range(reached[0], min(length, reached[-1] + num_tokens)))


@torch.no_grad()
def roll_out(
    drafter: Drafter,
    text: VerifiedText,
    places: Sequence[int],
    num_tokens: int,
    num_drafts: int | None = None,
) -> SurvivalCounts:
    """What becomes of the drafts of ``num_tokens`` that a decoder makes on its way.

    The first is at the first of ``places``; what it had right of the text is passed over, as is the
    token behind, which the verifier gives; the next one is at the next place from there, and so on
    for all places or ``num_drafts``. The token of a place is the last that the draft knows, and has
    no state yet.

    Raises:
        ValueError: places are not ascending, or not from 1 to the text's last.
    """
    length = len(text.token_ids)
    if list(places) != sorted(set(places)) or (places and not 0 < places[0] <= places[-1] < length):
        raise ValueError(
            f"places must be ascending from 1 to {length - 1}, found {list(places)[:8]}"
        )
    at_risk, right = [0] * num_tokens, [0] * num_tokens
    stepper = Stepper(drafter, text.token_ids, text.states)
    token_ids, choices = text.token_ids.tolist(), text.choices.tolist()
    come_to = 0
    for place in places:
        if place < come_to:
            continue
        if at_risk[0] == num_drafts:
            break
        drafted = stepper.propose(place, num_tokens, Chooser()).tolist()
        following = token_ids[place + 1 :]
        come_to = place + 1
        for position, is_right in enumerate(_judge(drafted, following, choices[place:])):
            at_risk[position] += 1
            right[position] += is_right
            come_to += is_right and following[position : position + 1] == [drafted[position]]
    return SurvivalCounts(tuple(at_risk), tuple(right))


def _judge(
    drafted: Sequence[int], following: Sequence[int], choices: Sequence[int]
) -> Iterator[bool]:
    """Whether each token of a draft is right, up to the first that is wrong or censored.

    drafted [2 3 8 9], text goes on [2 3 4], verifier says [2 3 8 5] -> True, True, True
    """
    for position, (token, choice) in enumerate(zip(drafted, choices, strict=False)):
        assert choice != UNKNOWN
        yield token == choice
        if token != choice or list(following[position : position + 1]) != [token]:
            return
