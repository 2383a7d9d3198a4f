"""Tries a draft on shorter contexts than it has.

A draft that was trained on short examples can fail in longer contexts, at any position: its
attention has never been over so many tokens. The same texts are replayed with the draft reading no
more than the last tokens before its own, as many as its examples had, at positions from 0. What it
gains by seeing less, it lost to the length of the context; the verifier's states are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import variance

from speculators_core.decoding.acceptance import ENOUGH_DRAFTS, AcceptanceCounts
from speculators_core.decoding.drafter import Drafter
from speculators_core.diagnosis.replay import Reading, SeenText, replay

TRIED_UNKNOWN = (128, 512)
"""Tokens of context that are tried where the lengths of the draft's examples are not known."""
MIN_RATIO = 1.5
MIN_T = 3.0
"""Least gain in tokens kept of a draft by which the length of the context counts as a cause, as a
ratio and in standard errors."""
MOST_DRAFTS = 256
"""Each draft in a shorter context reads all of it again."""


@dataclass(frozen=True)
class ContextTrial:
    """Drafts with more tokens before them than ``window``, with all of these and with the last."""

    window: int
    """Tokens that the draft saw."""
    longest: int
    """Longest context, in tokens."""
    whole: AcceptanceCounts
    """Drafts that saw the whole context."""
    short: AcceptanceCounts
    """Drafts that saw its last ``window`` tokens."""

    @property
    def t(self) -> float:
        """Gain in tokens kept of a draft, in standard errors."""
        sides = (self.short, self.whole)
        if min(side.num_drafts for side in sides) < 2:
            return 0.0
        error = sum(variance(side.accepted) / side.num_drafts for side in sides) ** 0.5
        gain = self.short.acceptance_length - self.whole.acceptance_length
        return gain / max(error, 1e-9)

    @property
    def is_cause(self) -> bool:
        """Whether the draft keeps far more tokens by seeing less, and not by chance."""
        short, whole = (side.acceptance_length - 1.0 for side in (self.short, self.whole))
        has_enough = min(self.short.num_drafts, self.whole.num_drafts) >= ENOUGH_DRAFTS
        return has_enough and short >= MIN_RATIO * whole and self.t >= MIN_T


def try_shorter_contexts(
    drafter: Drafter,
    texts: Sequence[SeenText],
    num_tokens: int,
    longest_trained: int | None = None,
) -> ContextTrial | None:
    """The trial with contexts of ``longest_trained`` tokens; None where no context is longer.

    Where that is not known, the best of those with `TRIED_UNKNOWN` tokens.
    """
    windows = TRIED_UNKNOWN if longest_trained is None else (longest_trained,)
    tried = [_try(drafter, texts, num_tokens, window) for window in windows]
    found = [trial for trial in tried if trial is not None]
    return max(found, key=lambda trial: trial.short.acceptance_length, default=None)


def _try(
    drafter: Drafter, texts: Sequence[SeenText], num_tokens: int, window: int
) -> ContextTrial | None:
    whole, short = AcceptanceCounts(num_tokens), AcceptanceCounts(num_tokens)
    longest = max((len(text.token_ids) for text in texts), default=0)
    for text in texts:
        if whole.num_drafts < MOST_DRAFTS:
            for counts, seen in ((whole, None), (short, window)):
                reading = Reading(drafter, window=seen)
                counts.accepted.extend(replay(reading, text, num_tokens, window + 1).accepted)
    return ContextTrial(window, longest, whole, short) if whole.num_drafts else None
