"""A text and the spans of it that the verifier wrote, as tokens and an exact loss mask.

    text    <user> hi <assistant> hello <end>     span: "hello <end>"
    tokens  <user>│hi│<assistant>│hello│<end>
    mask      0    0       0        1     1

Exact means that no token is partly one and partly the other, and that the tokens before a span are
those which a server makes of the text before it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase


class SkipReason(StrEnum):
    """Why a row, or a sequence of one, is left out."""

    MALFORMED = "not what its columns promise"
    TEMPLATE = "refused by the chat template"
    REWRITTEN = "the chat template writes an answer apart from its prompt"
    BORDER = "a token straddles the border of an answer"
    NO_ANSWER = "no answer to learn"
    CUT = "nothing to learn before engine.max_length"
    TOO_FEW = "fewer tokens to learn than data.min_trained_tokens"


class RowSkipped(Exception):
    """A row cannot be learned from; the run goes on without it."""

    def __init__(self, reason: SkipReason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class TokenSequence:
    """Token ids, and which of them are learned."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class Span:
    """Characters of a text, the end exclusive."""

    start: int
    end: int


@dataclass(frozen=True)
class SpanTokenizer:
    """Tokenises texts of which spans are learned."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int] = frozenset()

    def tokenize(self, text: str, spans: Iterable[Span]) -> TokenSequence:
        """The text's tokens, those in the spans to be learned.

        Where a span ends without a stop token and one follows at once, that is what ended it:
        GLM's answers end with the `<|user|>` of the message behind.

        Raises:
            RowSkipped: a span's border falls into a token.
        """
        encoding = self._encode(text, return_offsets_mapping=True)
        ids: list[int] = encoding["input_ids"]
        starts = [start for start, _ in encoding["offset_mapping"]]
        ends = [end for _, end in encoding["offset_mapping"]]
        mask = [False] * len(ids)
        for span in spans:
            first = self._first_behind(text, span.start, ids, starts, ends)
            last = len(ids) if span.end == len(text) else bisect_left(starts, span.end)
            ended = first < last and ids[last - 1] in self.stop_ids
            if first >= last or (ends[last - 1] > span.end and not ended):
                raise _straddled(text, span.end)
            if not ended and last < len(ids) and ids[last] in self.stop_ids:
                last += starts[last] == span.end
            mask[first:last] = [True] * (last - first)
        return TokenSequence(ids, mask)

    def _first_behind(
        self, text: str, border: int, ids: list[int], starts: list[int], ends: list[int]
    ) -> int:
        """The first token behind a border.

        The text between the last added token and the border is tokenised alone, as a server would;
        what lies before an added token does not change what follows. Offsets would not do: some
        tokenizers leave spaces out of them, and a border may change tokens that end before it.
        """
        anchor = bisect_right(ends, border) - 1
        while anchor > 0 and ids[anchor] not in self._added_ids:
            anchor -= 1
        start = starts[anchor] if anchor > 0 else 0
        anchor = max(anchor, 0)
        alone = self._encode(text[start:border])["input_ids"]
        first = anchor + len(alone)
        if ids[anchor:first] != alone or (first and ends[first - 1] > border):
            raise _straddled(text, border)
        return first

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _encode(self, text: str, **options: bool) -> Any:
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _straddled(text: str, border: int) -> RowSkipped:
    return RowSkipped(SkipReason.BORDER, f"behind {text[max(0, border - 20) : border]!r}")
