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
from typing import NamedTuple

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


class _Encoded(NamedTuple):
    """Tokens of a text, and which of its characters each stands for."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True)
class SpanTokenizer:
    """Tokenises texts of which spans are learned."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int] = frozenset()

    def tokenize(self, text: str, spans: Iterable[Span]) -> list[TokenSequence]:
        """The text's tokens, those in the spans to be learned.

        A span whose start falls into a token, such as an answer that begins with a newline after a
        template that ends with one, is learned in another sequence. That one is cut at the border,
        where the prompt of a server ends.

            whole   assistant│\\n\\n│hi      alone   assistant│\\n│  and  \\n│hi

        Where a span ends without a stop token and one follows at once, that is what ended it:
        GLM's answers end with the `<|user|>` of the next message.

        Raises:
            RowSkipped: a span's end falls into a token, or its start does and the tokenizer cannot
                read the parts alone.
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
        given, behind = self._encode(text[: span.start]), self._encode(text[span.start :])
        both = _Encoded(
            given.ids + behind.ids,
            given.starts + [span.start + place for place in behind.starts],
            given.ends + [span.start + place for place in behind.ends],
        )
        if self.tokenizer.decode(both.ids, clean_up_tokenization_spaces=False) != text:
            raise _straddled(text, span.start)
        mask = [False] * len(both.ids)
        self._mark(mask, span, len(given.ids), text, both)
        end = len(mask) - mask[::-1].index(True)
        return TokenSequence(both.ids[:end], mask[:end])

    def _mark(self, mask: list[bool], span: Span, first: int, text: str, encoded: _Encoded) -> None:
        """Learns the tokens from ``first`` to the end of the span."""
        ids, starts, ends = encoded
        last = len(ids) if span.end == len(text) else bisect_left(starts, span.end)
        ended = first < last and ids[last - 1] in self.stop_ids
        if first >= last or (ends[last - 1] > span.end and not ended):
            raise _straddled(text, span.end)
        if not ended and last < len(ids) and ids[last] in self.stop_ids:
            last += starts[last] == span.end
        mask[first:last] = [True] * (last - first)

    def _first_of(self, text: str, border: int, encoded: _Encoded) -> int | None:
        """The first token after a border; None where the border falls into a token.

        The text between the last added token and the border is tokenised alone, as a server would;
        what lies before an added token does not change what follows. Offsets would not do: some
        tokenizers leave spaces out of them, and a border may change tokens that end before it.
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
