"""A dozen short prompts: chat, code, maths, prose."""

from transformers import PreTrainedTokenizerBase

from speculators_core.decoding.prompts import Prompt

CATEGORY_OF_CHAT = "chat"

_TEXTS = {
    CATEGORY_OF_CHAT: (
        "How do I keep a sourdough starter alive when I travel for two weeks?",
        "Explain to a ten-year-old why the sky is blue.",
        "Write a short, polite e-mail that asks a colleague to move our meeting to Thursday.",
    ),
    "code": (
        'def merge_sorted(left, right):\n    """Merges two sorted lists into one."""\n',
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
        "import json\n\n\ndef read_settings(path):\n    with open(path) as file:\n",
    ),
    "maths": (
        "Question: A train covers 180 km in 2.5 hours. What is its average speed?\nAnswer:",
        "Question: What is the sum of the first 20 odd numbers?\nAnswer: Step by step,",
        "To solve x^2 - 5x + 6 = 0, we first",
    ),
    "prose": (
        "The lighthouse keeper had not spoken to anyone since the first storm of autumn, and",
        "The history of the printing press begins in",
        "In most cities, the price of a flat depends on",
    ),
}

DEFAULT_PROMPTS: tuple[Prompt, ...] = tuple(
    Prompt(category=category, prompt=text) for category, texts in _TEXTS.items() for text in texts
)
"""Plain text, which every verifier continues; `default_prompts` knows the chat template."""


def default_prompts(tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The default prompts, those of chat as conversations where the tokenizer has a template."""
    if tokenizer.chat_template is None:
        return list(DEFAULT_PROMPTS)
    return [_as_message(prompt) for prompt in DEFAULT_PROMPTS]


def _as_message(prompt: Prompt) -> Prompt:
    if prompt.category != CATEGORY_OF_CHAT:
        return prompt
    return Prompt(category=prompt.category, messages=({"role": "user", "content": prompt.prompt},))
