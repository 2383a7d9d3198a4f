"""Prompts from files of rows and hub data sets."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from transformers import PreTrainedTokenizerBase

from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.texts.chat import TemplateRefused, render_chat
from speculators_core.texts.messages import (
    Message,
    Tool,
    read_messages,
    read_template_options,
    read_tools,
)
from speculators_core.texts.row_files import Row, is_row_file, read_rows


class Prompt(BaseModel):
    """Plain text, or messages for the chat template; other keys of a row are ignored."""

    model_config = ConfigDict(frozen=True)
    category: str = "all"
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    """Also of ShareGPT's keys, and with content in parts: `read_messages` takes them all."""
    tools: tuple[Tool, ...] | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """Variables of the chat template for this prompt; they win over those for all prompts."""
    where: str = Field(default="", exclude=True, repr=False)
    """File and line, for messages."""

    @field_validator("messages", mode="before")
    @classmethod
    def _read_messages(cls, value: object) -> list[Message] | None:
        return read_messages(value) if value else None

    @field_validator("tools", mode="before")
    @classmethod
    def _read_tools(cls, value: object) -> list[Tool] | None:
        return read_tools(value)

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _read_options(cls, value: object) -> dict[str, Any] | None:
        return read_template_options(value) or None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if not (self.prompt or self.messages) or (self.prompt and self.messages):
            raise ValueError("expected either a non-empty 'prompt' or non-empty 'messages'")
        return self


class TokenizedPrompt(BaseModel):
    model_config = ConfigDict(frozen=True)
    category: str
    token_ids: list[int]


def read_prompts(source: str | Path, limit_per_category: int | None = None) -> list[Prompt]:
    """The prompts of a file of rows, or of a hub data set's test or train split.

    A file holds JSON lines, also compressed (.gz, .zst), or is Parquet.

    Raises:
        SpeculatorError: the source is missing or empty, or a row is not a prompt.
    """
    path = Path(source)
    is_file = path.exists() or is_row_file(path)
    prompts = _parse(path.name, read_rows(path)) if is_file else _read_hub(str(source))
    if not prompts:
        raise SpeculatorError(
            f"{source} holds no prompts. Write one JSON object per line, with 'prompt' or "
            "'messages'."
        )
    seen: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        seen[prompt.category] = seen.get(prompt.category, 0) + 1
        if limit_per_category is None or seen[prompt.category] <= limit_per_category:
            kept.append(prompt)
    return kept


def _parse(name: str, rows: Iterable[tuple[int, Row]]) -> list[Prompt]:
    prompts = []
    for number, row in rows:
        where = f"{name}, line {number}"
        try:
            prompts.append(Prompt.model_validate({**row, "where": where}))
        except (ValidationError, RecursionError) as error:
            fault = (
                first_fault(error) if isinstance(error, ValidationError) else "nested too deeply"
            )
            raise SpeculatorError(
                f"{where}: {fault}; expected an object with 'prompt' or 'messages'. Correct the "
                "line."
            ) from error
    return prompts


def _read_hub(name: str) -> list[Prompt]:
    from datasets import load_dataset  # takes a second, and most prompts are in a file

    try:
        splits = load_dataset(name)
    except Exception as error:  # datasets raises a dozen kinds, its own and its backends'
        raise SpeculatorError(
            f"{name}: neither a prompt file nor a data set of the hub: {first_line(error)}. "
            "Correct the name."
        ) from error
    rows = splits["test" if "test" in splits else next(iter(splits))]
    return _parse(name, enumerate(map(dict, rows), 1))


def tokenize(
    prompts: Iterable[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    template_options: Mapping[str, JsonValue] | None = None,
    vocab_size: int | None = None,
) -> list[TokenizedPrompt]:
    """Token ids, the chat template applied where a prompt is a conversation.

    ``template_options`` are variables of the template for all prompts. ``vocab_size`` is the
    verifier's, where its tokenizer may know more tokens, such as those of images.

    Raises:
        SpeculatorError: a prompt leaves no room for a new token in ``longest`` positions or has a
            token that the verifier lacks, there is no chat template to apply, or it refuses a
            conversation.
    """
    tokenized = []
    for number, prompt in enumerate(prompts, 1):
        name = prompt.where or f"prompt {number}"
        if prompt.messages:
            token_ids = _encode_chat(prompt, name, tokenizer, template_options or {})
        else:
            token_ids = tokenizer(prompt.prompt)["input_ids"]
        if len(token_ids) >= longest:
            raise SpeculatorError(
                f"{name} has {len(token_ids)} tokens, expected fewer than {longest}: the "
                "verifier's positions less the output. Shorten the prompt or the output."
            )
        if not token_ids:
            remedy = (
                "Repair the chat template, which renders the messages as nothing"
                if prompt.messages
                else "Write a longer prompt"
            )
            raise SpeculatorError(f"{name} has 0 tokens, expected at least 1. {remedy}.")
        if vocab_size is not None and max(token_ids) >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(max(token_ids))
            raise SpeculatorError(
                f"{name} has the token {token!r} ({max(token_ids)}), expected those of the "
                f"verifier's vocabulary of {vocab_size}. Leave it out of the prompt."
            )
        tokenized.append(TokenizedPrompt(category=prompt.category, token_ids=token_ids))
    return tokenized


def _encode_chat(
    prompt: Prompt,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    template_options: Mapping[str, JsonValue],
) -> list[int]:
    if tokenizer.chat_template is None:
        raise SpeculatorError(
            f"{name} is a conversation, and the verifier has no chat template. Pass plain text "
            "under 'prompt'."
        )
    assert prompt.messages is not None
    try:
        text = render_chat(
            tokenizer,
            prompt.messages,
            tools=prompt.tools,
            options={**template_options, **(prompt.chat_template_kwargs or {})},
        )
    except TemplateRefused as error:
        raise SpeculatorError(
            f"{name}: the verifier's chat template refuses the conversation: {error}. Change the "
            "messages or the template's options."
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def hash_prompts(prompts: Iterable[TokenizedPrompt]) -> str:
    """SHA-256 over categories and token ids."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.category}\n{prompt.token_ids}\n".encode())
    return digest.hexdigest()
