"""Predicts acceptance from texts with known verifier states.

No verifier is run. From a place of a text the draft proposes its tokens as in serving, each from
its previous ones. A token is right if it is the verifier's next one, which is known for as long as
the text and the draft are the same:

    text                x0 x1 x2 x3 x4        the verifier after    x1: x2   x2: x3   x3: y
    drafted after x1          x2 x3 y  z      right, right, right; then the text continues with x4
                                              and the verifier's token after y is unknown

So z is *censored*: neither right nor wrong. The rate at a position is taken over the drafts that
reached it (*at risk*), and the rates multiply (Kaplan and Meier 1958). Drafts are made where a
decoder makes them, each where the previous one ended: with one at every place, the easy stretches
that a decoder passes in one long draft would count most.

Over the verifier's greedy answers the result is that of decoding them, except for their ends. In a
text that the verifier did not write, later positions count only where it would write the same.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speculators_core.decoding.acceptance import CONTEXT_BUCKETS, AcceptanceCounts, context_of
from speculators_core.decoding.drafter import Chooser, Drafter
from speculators_core.diagnosis.replay import Stepper

UNKNOWN = -1
"""In place of a verifier's token that was not computed."""
DRAFTS_OF_TEXT = 32
"""A few long stretches measure less well than more of this length."""


@dataclass(frozen=True)
class SurvivalCounts:
    """How far drafts got, position by position."""

    at_risk: tuple[int, ...]
    """Drafts that reached position k: right before it, and the verifier's token is known there."""
    right: tuple[int, ...]
    """Drafts among them that had the verifier's token."""
    contexts: Mapping[str, "SurvivalCounts"] = field(default_factory=dict, compare=False)
    """The same drafts by the number of tokens before them, in the ranges of `CONTEXT_BUCKETS` with
    drafts; empty where that was not counted."""

    @classmethod
    def none(cls, num_tokens: int) -> "SurvivalCounts":
        return cls((0,) * num_tokens, (0,) * num_tokens)

    @classmethod
    def of(
        cls, counts: AcceptanceCounts, contexts: Mapping[str, AcceptanceCounts] | None = None
    ) -> "SurvivalCounts":
        """The counts of drafts that were verified whole."""
        kept_to = (counts.num_drafts, *counts.accepted_per_position)
        parts = {name: cls.of(part) for name, part in (contexts or {}).items()}
        return cls(kept_to[:-1], kept_to[1:], parts)

    def __add__(self, other: "SurvivalCounts") -> "SurvivalCounts":
        """The drafts of both together."""
        both = ((self.at_risk, other.at_risk), (self.right, other.right))
        at_risk, right = (tuple(map(sum, zip(a, b, strict=True))) for a, b in both)
        none = self.none(len(at_risk))
        contexts = {
            name: self.contexts.get(name, none) + other.contexts.get(name, none)
            for name in CONTEXT_BUCKETS
            if name in self.contexts or name in other.contexts
        }
        return SurvivalCounts(at_risk, right, contexts)

    @property
    def num_places(self) -> int:
        """Drafts in all: each reaches its first position."""
        return self.at_risk[0]

    @property
    def conditional(self) -> tuple[float | None, ...]:
        """Share right at position k of the drafts that reached it; None where none did."""
        counts = zip(self.right, self.at_risk, strict=True)
        return tuple(right / at_risk if at_risk else None for right, at_risk in counts)

    @property
    def joint(self) -> tuple[float, ...]:
        """Chance that positions 1 to k are all kept; 0 from the first that no draft reached."""
        return tuple(accumulate((rate or 0.0 for rate in self.conditional), mul))

    @property
    def acceptance_length(self) -> float:
        """Tokens per verifier step, the bonus token included; 1 where there was no draft.

        Too low by the positions after one that every draft was censored before.
        """
        return 1.0 + sum(self.joint)


@dataclass(frozen=True)
class VerifiedText:
    """A text with the verifier's states and tokens; row t is token t, nothing is shifted."""

    token_ids: Int[Tensor, "seq"]
    states: Float[Tensor, "seq aux_hidden"]
    """States at the draft's `aux_layer_ids`, side by side."""
    choices: Int[Tensor, "seq"]
    """The verifier's greedy token after each one; `UNKNOWN` where no draft needs it."""


def bonus_places(loss_mask: Bool[Tensor, "seq"]) -> Int[Tensor, "places"]:
    """Places whose token can be a bonus token in serving: an answer's, with another after it.

    The first token of an answer is one, as it comes from prefill; the end of a turn is not.

    loss mask 0 0 1 1 1 0 0 1 1 -> 2 3 7
    """
    places = (loss_mask[:-1] & loss_mask[1:]).nonzero().flatten()
    return places[places > 0]


def share_drafts(num_places: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """Most drafts in each text, ``count`` in all.

    Texts with a place are taken in an order that the seed draws; each for `DRAFTS_OF_TEXT`, or for
    more where that would leave some over.
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
    """The places that so many drafts can reach in a text of ``length`` tokens, and the rows of
    `VerifiedText.choices` that they are compared with."""
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
    """Counts of the drafts of ``num_tokens`` that a decoder makes in a text.

    The first is at the first of ``places``; the tokens that it had right are skipped, as is the
    one after them, which the verifier gives; the next one is at the next place from there, and so
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
    total = SurvivalCounts.none(num_tokens)
    stepper = Stepper(drafter, text.token_ids, text.states)
    token_ids, choices = text.token_ids.tolist(), text.choices.tolist()
    come_to = 0
    for place in places:
        if place < come_to:
            continue
        if total.num_places == num_drafts:
            break
        drafted = stepper.propose(place, num_tokens, Chooser()).tolist()
        following = token_ids[place + 1 :]
        come_to = place + 1
        at_risk, right = [0] * num_tokens, [0] * num_tokens
        for position, is_right in enumerate(_judge(drafted, following, choices[place:])):
            at_risk[position], right[position] = 1, int(is_right)
            come_to += is_right and following[position : position + 1] == [drafted[position]]
        one = SurvivalCounts(tuple(at_risk), tuple(right))
        total += SurvivalCounts(one.at_risk, one.right, {context_of(place + 1): one})
    return total


def _judge(
    drafted: Sequence[int], following: Sequence[int], choices: Sequence[int]
) -> Iterator[bool]:
    """Whether each token of a draft is right, up to the first that is wrong or censored.

    drafted [2 3 8 9], text continues [2 3 4], verifier [2 3 8 5] -> True, True, True
    """
    for position, (token, choice) in enumerate(zip(drafted, choices, strict=False)):
        assert choice != UNKNOWN
        yield token == choice
        if token != choice or list(following[position : position + 1]) != [token]:
            return
