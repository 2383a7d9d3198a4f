"""Conversations as token ids with exact loss masks.

The text that a verifier writes in a turn is found by rendering the conversation twice: up to the
turn with the generation prompt, and including the turn. The verifier wrote the difference, up to
the stop token, but not the newline that a template adds after it.

    <user> hi <assistant>                     prompt
    <user> hi <assistant> hello <end> \\n      answered
                          └─ written ┘

Many templates rewrite history: Qwen3 drops the reasoning of earlier turns, gpt-oss their analysis.
A turn is learned after the history that the verifier saw when it wrote the turn. Turns whose
history is unchanged at the end of the conversation share one sequence; every other turn gets a
separate one. So does a turn whose first token a tokenizer would merge with the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import commonprefix
from pathlib import Path

from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from speculators_core.data_generation.settings import DataGenConfig
from speculators_core.data_generation.texts.spans import (
    RowSkipped,
    SkipReason,
    Span,
    SpanTokenizer,
    TokenSequence,
)
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.texts.chat import TemplateRefused, render_chat, reserved_option
from speculators_core.texts.messages import Message, Tool
from speculators_core.verifier.reading import read_generation_config, read_tokenizer


@dataclass(frozen=True)
class Conversation:
    """Messages and the tools that they may call."""

    messages: list[Message]
    tools: list[Tool] | None = None
    num_given: int = 0
    """Number of messages at the start that are not learned."""
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    """Variables of the template for this conversation, which take precedence."""


@dataclass(frozen=True)
class ChatTemplate:
    """A verifier's chat template, with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    template: str | None = None
    """Jinja text; None for the tokenizer's template."""
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    """Additional variables of the template."""

    def __post_init__(self) -> None:
        if name := reserved_option(self.tokenizer, self.options):
            raise SpeculatorError(
                f"data.template_options.{name} is a parameter of `apply_chat_template`, which "
                "data generation sets; expected a variable of the chat template. Remove it."
            )

    @cached_property
    def spans(self) -> SpanTokenizer:
        return SpanTokenizer(self.tokenizer, self.stop_ids)

    @cached_property
    def stop_tokens(self) -> list[str]:
        return [str(t) for t in self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids)) if t]

    def render(self, conversation: Conversation, num_messages: int, prompt: bool) -> str:
        """The text of the first messages; with ``prompt``, followed by the generation prompt.

        Raises:
            RowSkipped: the template refuses them.
            SpeculatorError: the template is not valid Jinja.
        """
        try:
            return render_chat(
                self.tokenizer,
                conversation.messages[:num_messages],
                tools=conversation.tools,
                template=self.template,
                options={**self.options, **conversation.options},
                has_generation_prompt=prompt,
            )
        except TemplateRefused as error:
            raise RowSkipped(SkipReason.TEMPLATE, str(error)) from error

    def tokenize(self, conversation: Conversation, is_open: bool = False) -> list[TokenSequence]:
        """Sequences with every assistant turn once.

        ``is_open``: a conversation that ends with another role's turn gets the generation prompt,
        for the verifier to continue; otherwise the messages after the last answer are dropped.

        Raises:
            RowSkipped: there is no answer, the template refuses the conversation, or it has no
                exact mask.
        """
        roles = [message["role"] for message in conversation.messages]
        texts: list[tuple[str, list[Span]]] = []
        if is_open and roles[-1] != "assistant":
            texts.append((self.render(conversation, len(roles), prompt=True), []))
        for turn in reversed(range(conversation.num_given, len(roles))):
            if roles[turn] == "assistant" and conversation.messages[turn].get("train", True):
                prompt, written = self._split(conversation, turn)
                if not written:
                    continue
                answered = prompt + written
                spans = next((spans for text, spans in texts if text.startswith(answered)), None)
                if spans is None:
                    texts.append((answered, spans := []))
                spans.append(Span(len(prompt), len(answered)))
        if not texts:
            raise RowSkipped(SkipReason.NO_ANSWER, f"its turns are {', '.join(roles)}")
        return [sequence for text in texts for sequence in self.spans.tokenize(*text)]

    def _split(self, conversation: Conversation, turn: int) -> tuple[str, str]:
        """The text before a turn, and the text that the verifier wrote in it."""
        prompt = self.render(conversation, turn, prompt=True)
        answered = self.render(conversation, turn + 1, prompt=False)
        written = answered.removeprefix(prompt)
        if not answered.startswith(prompt):
            written = self._after_rewritten(conversation, turn, prompt, answered)
        stops = [written.find(stop) + len(stop) for stop in self.stop_tokens if stop in written]
        written = written[: min(stops)] if stops else written.rstrip()
        return prompt, written

    def _after_rewritten(
        self, conversation: Conversation, turn: int, prompt: str, answered: str
    ) -> str:
        """The text of a turn that changes the history before it.

        gpt-oss drops the analysis of a tool call once there is an answer. Changing the previous
        message shows where its text ends; the turn follows the generation prompt after that.
        """
        *earlier, before = conversation.messages[:turn]
        mark = "y" if before["content"].endswith("x") else "x"
        changed = [*earlier, before | {"content": before["content"] + mark}]
        other = replace(conversation, messages=[*changed, conversation.messages[turn]])
        other_answered = self.render(other, turn + 1, prompt=False)
        ends = commonprefix([answered[::-1], other_answered[::-1]])[::-1]
        opening = prompt.removeprefix(self.render(conversation, turn, prompt=False))
        if ends == answered or opening in ("", prompt) or opening not in ends:
            raise RowSkipped(SkipReason.REWRITTEN, f"{prompt[-40:]!r} before message {turn + 1}")
        return ends.partition(opening)[2]


def load_tokenizer(data: DataGenConfig) -> PreTrainedTokenizerBase:
    """The verifier's tokenizer, with the configuration's overrides.

    Raises:
        SpeculatorError: there is none, or it cannot map tokens to characters.
    """
    tokenizer = read_tokenizer(data.verifier, data.trust_remote_code, **data.tokenizer_options)
    if not tokenizer.is_fast:
        raise SpeculatorError(
            f"{data.verifier}: its tokenizer {type(tokenizer).__name__} does not map tokens to "
            "characters; expected a fast tokenizer with a `tokenizer.json`. Convert it with "
            "Transformers' `convert_slow_tokenizer`."
        )
    return tokenizer


def load_chat_template(
    data: DataGenConfig, tokenizer: PreTrainedTokenizerBase
) -> ChatTemplate | None:
    """The configured chat template, by default the verifier's; None if the verifier has none.

    Raises:
        SpeculatorError: the template cannot be found, or its options are invalid.
    """
    template = None
    if data.chat_template is not None:
        template = resolve_chat_template(data.chat_template)
    elif tokenizer.chat_template is None:
        return None
    stop_ids = find_stop_ids(data.verifier, tokenizer)
    return ChatTemplate(tokenizer, stop_ids, template, data.template_options)


def resolve_chat_template(given: str) -> str:
    """The Jinja text of a template given as text, as a file, or as a tokenizer that has one.

    Raises:
        SpeculatorError: there is no such file or tokenizer, or the tokenizer has no template.
    """
    if "{{" in given or "{%" in given:
        return given
    path = Path(given).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpeculatorError(
                f"data.chat_template: {path} cannot be read: {first_line(error)}; expected a file "
                "of UTF-8 text. Check its permissions and encoding."
            ) from error
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        raise SpeculatorError(
            f"data.chat_template: {path} does not exist; expected a file of Jinja text. Correct "
            "the path."
        )
    tokenizer = read_tokenizer(str(path) if path.is_dir() else given)
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise SpeculatorError(
            f"data.chat_template: the tokenizer {given} has no chat template: {first_line(error)} "
            "Name another tokenizer, or a file of Jinja text."
        ) from error


def find_stop_ids(verifier: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer, from the verifier's generation config and the tokenizer."""
    config = read_generation_config(verifier)
    found = None if config is None else config.eos_token_id
    stops = {found} if isinstance(found, int) else set(found or ())
    return frozenset(stops | {tokenizer.eos_token_id} - {None})
