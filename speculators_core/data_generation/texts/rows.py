"""Rows of data sets: their kind and their tokens.

input_ids, loss_mask      token ids         unchanged
messages, tools           conversation      learned: all assistant turns, but for those with a
                                            weight of 0 or train false
prompt, completion        completion        learned: the completion and a stop token after it;
                                            both may be messages, with tools
text                      text              learned: all tokens but the first, which has no context
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from speculators_core.data_generation.settings import ColumnMapping
from speculators_core.data_generation.texts.conversations import ChatTemplate, Conversation
from speculators_core.data_generation.texts.spans import (
    RowSkipped,
    SkipReason,
    Span,
    SpanTokenizer,
    TokenSequence,
)
from speculators_core.errors import SpeculatorError
from speculators_core.texts.messages import (
    MalformedRow,
    read_messages,
    read_template_options,
    read_tools,
    shown,
)

MESSAGES = ("messages", "conversations", "conversation")
COMPLETIONS = ("completion", "response")
TEMPLATE_OPTIONS = "chat_template_kwargs"
"""Column of the chat template's variables for one row, named as servers name it."""

Row = Mapping[str, object]
"""Values by column, of the data set's types."""


class RowKind(StrEnum):
    TOKENS = "token ids"
    CONVERSATION = "conversations"
    COMPLETION = "prompts with completions"
    PROMPT = "prompts"
    TEXT = "plain text"


@dataclass(frozen=True)
class RowParts:
    """The kind of a source's rows, and the columns that they are read from."""

    kind: RowKind
    main: str
    """Column of the token ids, messages, prompts or text."""
    loss_mask: str | None = None
    tools: str | None = None
    completion: str | None = None
    template_options: str | None = None

    @property
    def columns(self) -> list[str]:
        named = (self.main, self.loss_mask, self.tools, self.completion, self.template_options)
        return [name for name in named if name is not None]


def choose_parts(
    columns: Sequence[str], mapping: ColumnMapping, where: str, is_open: bool
) -> RowParts:
    """The kind of rows with these columns: the first whose columns are present.

    Kinds with columns that the mapping renames take precedence. ``is_open``: a prompt without a
    completion is enough.

    Raises:
        SpeculatorError: no kind fits, or a column that the mapping names is missing.
    """
    usual, named = ColumnMapping(), set()
    for part, name in mapping:
        if name is None or name == getattr(usual, part):
            continue
        if name not in columns:
            raise SpeculatorError(
                f"{where} has no column {name!r}, named by `columns.{part}`; expected one of "
                f"{', '.join(columns)}. Correct `columns.{part}`."
            )
        named.add(name)

    def held(*names: str) -> str | None:
        return next((name for name in names if name in columns), None)

    for_template = {"tools": held(mapping.tools), "template_options": held(TEMPLATE_OPTIONS)}
    messages = held(*([mapping.messages] if mapping.messages else MESSAGES))
    completion = held(*([mapping.completion] if mapping.completion else COMPLETIONS))
    kinds = []
    if ids := held(mapping.input_ids):
        kinds.append(RowParts(RowKind.TOKENS, ids, loss_mask=held(mapping.loss_mask)))
    if messages:
        kinds.append(RowParts(RowKind.CONVERSATION, messages, **for_template))
    if prompt := held(mapping.prompt):
        if completion:
            both = RowParts(RowKind.COMPLETION, prompt, completion=completion, **for_template)
            kinds.append(both)
        elif is_open:
            kinds.append(RowParts(RowKind.PROMPT, prompt, **for_template))
    if text := held(mapping.text):
        kinds.append(RowParts(RowKind.TEXT, text))
    if kinds:
        return min(kinds, key=lambda parts: named.isdisjoint(parts.columns))
    raise SpeculatorError(
        f"{where} has the columns {', '.join(columns)}; expected "
        f"{mapping.input_ids!r}, {mapping.messages or 'messages'!r}, {mapping.prompt!r} with "
        f"{mapping.completion or 'completion'!r}, or {mapping.text!r}. Name yours with `columns`."
    )


@dataclass(frozen=True)
class RowReader:
    """Rows as token sequences, for one verifier."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate | None
    is_open: bool = False
    """Whether the verifier generates the continuation, so a row may end with a prompt."""

    def read(self, row: Row, parts: RowParts) -> list[TokenSequence]:
        """The row's sequences; more than one where a chat template rewrites history.

        Raises:
            RowSkipped: the row cannot be learned from.
        """
        try:
            return self._read(row, parts)
        except MalformedRow as error:
            raise RowSkipped(SkipReason.MALFORMED, str(error)) from error
        except RecursionError as error:
            raise RowSkipped(SkipReason.MALFORMED, "nested too deeply") from error

    def _read(self, row: Row, parts: RowParts) -> list[TokenSequence]:
        main = row[parts.main]
        if parts.kind is RowKind.TOKENS:
            mask = row[parts.loss_mask] if parts.loss_mask else None
            return [self._check_tokens(main, mask)]
        tools = read_tools(row[parts.tools]) if parts.tools else None
        options = read_template_options(
            row[parts.template_options] if parts.template_options else None
        )
        if parts.kind is RowKind.CONVERSATION:
            return self._converse(Conversation(read_messages(main), tools, options=options))
        completion = row[parts.completion] if parts.completion else None
        if isinstance(main, list):
            given = read_messages(main)
            learned = read_messages(completion) if parts.completion else []
            return self._converse(Conversation(given + learned, tools, len(given), options))
        if parts.kind is RowKind.TEXT:
            return [self._tokenize_text(_text(main, parts.main))]
        answer = _text(completion, parts.completion) if parts.completion else None
        return [self._complete(_text(main, parts.main), answer)]

    def _check_tokens(self, ids: object, mask: object) -> TokenSequence:
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise MalformedRow(f"expected a list of token ids, found {shown(ids)}")
        vocab_size = len(self.tokenizer)
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise MalformedRow(
                f"expected token ids in 0..{vocab_size - 1}, found {min(ids)}..{max(ids)}"
            )
        if mask is None:
            return TokenSequence(ids, [True] * len(ids))
        if not isinstance(mask, list) or not all(flag in (0, 1) for flag in mask):
            raise MalformedRow(f"expected a loss mask of 0 and 1, found {shown(mask)}")
        if len(mask) != len(ids):
            raise MalformedRow(f"expected a loss mask of {len(ids)} tokens, found {len(mask)}")
        return TokenSequence(ids, [bool(flag) for flag in mask])

    def _converse(self, conversation: Conversation) -> list[TokenSequence]:
        if self.chat is None:
            raise RowSkipped(SkipReason.TEMPLATE, "the verifier has no chat template")
        return self.chat.tokenize(conversation, self.is_open)

    def _tokenize_text(self, text: str) -> TokenSequence:
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        return TokenSequence(ids, [False] + [True] * (len(ids) - 1))

    def _complete(self, prompt: str, completion: str | None) -> TokenSequence:
        """The prompt after a beginning-of-text token, and the completion with a stop token.

        Both are tokenised separately, as a server does, where that preserves the text.
        SentencePiece adds a space to a separate text; then both are tokenised together.
        """
        begin, end = self._frame
        given = self._encode(prompt)
        if completion is None:
            return TokenSequence(begin + given, [False] * len(begin + given))
        learned = self._encode(completion)
        if self._decode(given + learned) == prompt + completion:
            whole = TokenSequence(given + learned, [False] * len(given) + [True] * len(learned))
        else:
            text = prompt + completion
            spans = SpanTokenizer(self.tokenizer)
            [whole] = spans.tokenize(text, [Span(len(prompt), len(text))])
        if whole.input_ids[-1:] == end:
            end = []
        return TokenSequence(
            begin + whole.input_ids + end,
            [False] * len(begin) + whole.loss_mask + [True] * len(end),
        )

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """Token ids before and after a text."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        begins = bos is not None and self.tokenizer("a")["input_ids"][0] == bos
        return [bos] if begins else [], [] if eos is None else [eos]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _text(value: object, column: str) -> str:
    if not isinstance(value, str) or not value:
        raise MalformedRow(f"expected text in {column!r}, found {shown(value)}")
    return value
