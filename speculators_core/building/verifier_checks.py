"""Checks of a verifier's tokenizer and chat template.

Checked before any weights are loaded.
"""

import logging
from collections.abc import Mapping

from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from speculators_core.data_generation.texts.conversations import find_stop_ids
from speculators_core.errors import SpeculatorError
from speculators_core.texts.chat import TemplateRefused, render_chat
from speculators_core.texts.messages import Message
from speculators_core.verifier.reading import read_tokenizer

logger = logging.getLogger(__name__)

QUESTION: Message = {"role": "user", "content": "17"}
ANSWER: Message = {"role": "assistant", "content": "23"}


def open_tokenizer(verifier: str, options: Mapping[str, JsonValue]) -> PreTrainedTokenizerBase:
    """The verifier's tokenizer, with a chat template that asks for answers.

    ``options``: variables of the template. A template that writes the date leads to a warning.

    Raises:
        SpeculatorError: there is no chat template, it has no generation prompt, it refuses a
            question, or no token ends an answer.
    """
    tokenizer = read_tokenizer(verifier)
    if tokenizer.chat_template is None:
        raise SpeculatorError(
            f"{verifier} has no chat template, which answers need; expected a chat_template.jinja "
            "in its folder. Add the template of its family, or choose a chat model.",
            cause="chat template",
        )
    if not find_stop_ids(verifier, tokenizer):
        raise SpeculatorError(
            f"{verifier}: no token ends an answer, so each would run to answers.sampling.max_tokens"
            "; expected eos_token_id in generation_config.json or eos_token in "
            "tokenizer_config.json. Add one of them."
        )
    try:
        _check_generation_prompt(verifier, tokenizer, options)
        _warn_of_dates(verifier, tokenizer, options)
    except TemplateRefused as error:
        raise SpeculatorError(
            f"{verifier}: the chat template refuses a question of a user: {error}. Correct the "
            "template, or answers.sampling.template_options.",
            cause="chat template",
        ) from error
    return tokenizer


def _check_generation_prompt(
    verifier: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, JsonValue]
) -> None:
    """A template may do without one only where an answer follows the question directly."""
    asked = render_chat(tokenizer, [QUESTION], options=options)
    if asked != render_chat(tokenizer, [QUESTION], options=options, has_generation_prompt=False):
        return
    answered = render_chat(
        tokenizer, [QUESTION, ANSWER], options=options, has_generation_prompt=False
    )
    opening = answered.removeprefix(asked).partition(ANSWER["content"])[0]
    if opening.strip() or not answered.startswith(asked):
        raise SpeculatorError(
            f"{verifier}: the chat template ignores add_generation_prompt, so the verifier would "
            f"have to write {opening.strip()[:40]!r} itself; expected a template that ends a "
            "question with the opening of the answer. Add `{% if add_generation_prompt %}` with it "
            "at the template's end.",
            cause="chat template",
        )


def _warn_of_dates(
    verifier: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, JsonValue]
) -> None:
    """Two clocks that give two texts are a date in the prompt."""
    texts = {
        render_chat(tokenizer, [QUESTION], options={"strftime_now": lambda _, at=at: at, **options})
        for at in ("1", "2")
    }
    if len(texts) > 1:
        logger.warning(
            "%s: the chat template writes today's date, so prompts of a build that is resumed "
            "tomorrow differ; fix it with answers.sampling.template_options, such as "
            '{"date_string": "26 Jul 2024"}, if the template has a variable for it',
            verifier,
        )
