"""Tokens and exact loss masks of spans in texts.

    text    <user> hi <assistant> hello <end>     span: "hello <end>"
    tokens  <user>│hi│<assistant>│hello│<end>
    mask      0    0       0        1     1

A span is text that the verifier wrote. Exact means that no token lies partly in a span, and that
the tokens before a span are those that a server makes of the text before it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class SkipReason(StrEnum):
    """Why a row, or a sequence of it, is skipped."""

    MALFORMED = "not what its columns promise"
    TEMPLATE = "refused by the chat template"
    REWRITTEN = "the chat template writes an answer apart from its prompt"
    BORDER = "a token straddles the border of an answer"
    NO_ANSWER = "no answer to learn"
    CUT = "nothing to learn before engine.max_length"
    TOO_FEW = "fewer tokens to learn than data.min_trained_tokens"


class RowSkipped(Exception):
    """A row cannot be learned from; the run continues without it."""

    def __init__(self, reason: SkipReason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class TokenSequence:
    """Token ids, and a mask of those that are learned."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class Span:
    """A range of characters in a text; ``end`` is exclusive."""

    start: int
    end: int


class _Encoded(NamedTuple):
    """Tokens of a text, with the character range of each."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True)
class SpanTokenizer:
    """Tokenises texts in which some spans are learned."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int] = frozenset()

    def tokenize(self, text: str, spans: Iterable[Span]) -> list[TokenSequence]:
        """The text's tokens, with the tokens of the spans in the loss mask.

        A span whose start lies within a token, such as an answer that begins with a newline after a
        template that ends with one, is learned in another sequence. That one is cut at the border,
        where a server's prompt ends.

            whole   assistant│\\n\\n│hi      alone   assistant│\\n│  and  \\n│hi

        A span without a stop token is extended by one that follows immediately: GLM's answers end
        with the `<|user|>` of the next message.

        Raises:
            RowSkipped: a token straddles a span's end, or its start and the tokenizer cannot read
                the parts alone.
        """
        encoded = self._encode(text)
        mask = [False] * len(encoded.ids)
        apart: list[TokenSequence] = []
        for span in spans:
            first = self._first_of(text, span.start, encoded)
            if first is None:
                apart.append(self._apart(text, span))
            else:
                self._mark(mask, span, first, text, encoded)
        whole = TokenSequence(encoded.ids, mask)
        return [whole, *apart] if any(mask) or not apart else apart

    def _apart(self, text: str, span: Span) -> TokenSequence:
        """A sequence that ends with this span, cut at its start."""
        given, rest = self._encode(text[: span.start]), self._encode(text[span.start :])
        both = _Encoded(
            given.ids + rest.ids,
            given.starts + [span.start + place for place in rest.starts],
            given.ends + [span.start + place for place in rest.ends],
        )
        if self.tokenizer.decode(both.ids, clean_up_tokenization_spaces=False) != text:
            raise _straddled(text, span.start)
        mask = [False] * len(both.ids)
        self._mark(mask, span, len(given.ids), text, both)
        end = len(mask) - mask[::-1].index(True)
        return TokenSequence(both.ids[:end], mask[:end])

    def _mark(self, mask: list[bool], span: Span, first: int, text: str, encoded: _Encoded) -> None:
        """Marks the tokens from ``first`` to the end of the span."""
        ids, starts, ends = encoded
        last = len(ids) if span.end == len(text) else bisect_left(starts, span.end)
        ended = first < last and ids[last - 1] in self.stop_ids
        if first >= last or (ends[last - 1] > span.end and not ended):
            raise _straddled(text, span.end)
        if not ended and last < len(ids) and ids[last] in self.stop_ids:
            last += starts[last] == span.end
        mask[first:last] = [True] * (last - first)

    def _first_of(self, text: str, border: int, encoded: _Encoded) -> int | None:
        """Index of the first token after a border; None where the border lies within a token.

        The text between the last added token and the border is tokenised alone, as a server would;
        the text before an added token does not affect the text after it. Offsets are not enough:
        some tokenizers exclude spaces from them, and a border may change tokens that end before it.
        """
        ids, starts, ends = encoded
        anchor = bisect_right(ends, border) - 1
        while anchor > 0 and ids[anchor] not in self._added_ids:
            anchor -= 1
        start = starts[anchor] if anchor > 0 else 0
        anchor = max(anchor, 0)
        alone = self._encode(text[start:border]).ids
        first = anchor + len(alone)
        is_cut = ids[anchor:first] != alone or bool(first and ends[first - 1] > border)
        return None if is_cut else first

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _encode(self, text: str) -> _Encoded:
        found = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        places = found["offset_mapping"]
        return _Encoded(
            found["input_ids"], [start for start, _ in places], [end for _, end in places]
        )


def _straddled(text: str, border: int) -> RowSkipped:
    return RowSkipped(SkipReason.BORDER, f"after {text[max(0, border - 20) : border]!r}")
