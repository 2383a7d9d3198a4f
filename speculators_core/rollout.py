"""Predicts how much of a draft is kept, from texts whose verifier states are known.

No verifier is run. From a place of a text the draft proposes its tokens as it is served, each on
its own output. A token is right if it is what the verifier says next, which is known for as long as
the text itself goes the way of the draft:

    text                x0 x1 x2 x3 x4        the verifier after    x1: x2   x2: x3   x3: y
    drafted after x1          x2 x3 y  z      right, right, right; then the text goes on with x4
                                              and what the verifier says after y is unknown

So z is *censored*: neither right nor wrong. The rate at a position is taken over the drafts that
came to it (*at risk*), and the rates multiply (Kaplan and Meier 1958). Over the verifier's own
greedy answers nothing is censored but by the end of a text.

It is a prediction, for two reasons. Places count alike, while a decoder drafts where its last draft
ended, and so less often where drafts are long: over the verifier's own answers to the playground's
prompts 2.60 is predicted for EAGLE-3's 2.42, 1.93 for P-EAGLE's 1.83, 2.17 for DFlash's 1.95, and
3.52 for MTP's 3.08. And of a text that the verifier did not write, later positions are seen only
where it would have written the same.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speculators_core.drafter import Chooser, Drafter
from speculators_core.replay import Stepper
from speculators_core.texts import AcceptanceCounts

UNKNOWN = -1
"""In place of a token that nobody has asked the verifier for."""


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


def draw_places(
    candidates: Sequence[Int[Tensor, "places"]], count: int, seed: int = 0
) -> list[list[int]]:
    """So many places of all texts' candidates, each as likely; ascending, text by text.

    All where there are fewer. The same seed and candidates give the same places.
    """
    ends = list(accumulate(map(len, candidates)))
    total = ends[-1] if ends else 0
    drawn: list[list[int]] = [[] for _ in candidates]
    for number in sorted(random.Random(seed).sample(range(total), min(count, total))):
        text = bisect_right(ends, number)
        drawn[text].append(int(candidates[text][number - ends[text]]))
    return drawn


def judging_rows(places: Sequence[int], num_tokens: int, length: int) -> list[int]:
    """The rows of `VerifiedText.choices` that drafts of these places are held against."""
    reached = (range(place, min(place + num_tokens, length)) for place in places)
    return sorted({row for rows in reached for row in rows})


@torch.no_grad()
def roll_out(
    drafter: Drafter, text: VerifiedText, places: Sequence[int], num_tokens: int
) -> SurvivalCounts:
    """What becomes of a draft of ``num_tokens`` after each of these places of a text.

    The token of a place is the last that the draft knows, and has no state yet.

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
    drafts = [stepper.propose(place, num_tokens, Chooser()) for place in places]
    token_ids, choices = text.token_ids.tolist(), text.choices.tolist()
    for place, drafted in zip(places, drafts, strict=True):
        verdicts = _judge(drafted.tolist(), token_ids[place + 1 :], choices[place:])
        for position, is_right in enumerate(verdicts):
            at_risk[position] += 1
            right[position] += is_right
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
