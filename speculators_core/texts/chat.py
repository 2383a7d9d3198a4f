"""Conversations rendered by a chat template."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from speculators_core.errors import SpeculatorError, first_line
from speculators_core.texts.messages import Message, Tool

RENDERING_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""Errors that a template can raise on messages that it does not support."""


class TemplateRefused(ValueError):
    """A chat template does not take a conversation; the text is the template's reason."""


def reserved_option(
    tokenizer: PreTrainedTokenizerBase, options: Mapping[str, JsonValue]
) -> str | None:
    """The first option that is a parameter of ``apply_chat_template``; None without one."""
    known = inspect.signature(tokenizer.apply_chat_template).parameters
    return next((name for name in options if name in known), None)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
    has_generation_prompt: bool = True,
) -> str:
    """The text of messages, by default under the tokenizer's template.

    ``options`` are variables of the template, such as ``enable_thinking``.

    Raises:
        TemplateRefused: the template does not take the messages or the options.
        SpeculatorError: the template is not valid Jinja.
    """
    options = options or {}
    if name := reserved_option(tokenizer, options):
        raise TemplateRefused(f"{name!r} is a parameter of `apply_chat_template`, not a variable")
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            chat_template=template,
            add_generation_prompt=has_generation_prompt,
            tokenize=False,
            **options,
        )
    except TemplateSyntaxError as error:
        raise SpeculatorError(
            f"{'the' if template else tokenizer.name_or_path + ': the'} chat template is not valid "
            f"Jinja: line {error.lineno}: {first_line(error).rstrip('.')}; expected a Jinja "
            "template. Correct it (chat_template.jinja, or chat_template in tokenizer_config.json)."
        ) from error
    except RENDERING_ERRORS as error:
        raise TemplateRefused(first_line(error)) from error
