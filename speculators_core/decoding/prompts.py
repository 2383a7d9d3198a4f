"""Prompts from JSONL files and hub data sets."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from speculators_core.errors import SpeculatorError, first_fault, first_line


class Prompt(BaseModel):
    """Plain text, or messages for the chat template; other keys of a row are ignored."""

    model_config = ConfigDict(frozen=True)
    category: str = "all"
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None

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
    """The prompts of a JSONL file, or of a hub data set's test or train split.

    Raises:
        SpeculatorError: the source is missing or empty, or a row is not a prompt.
    """
    path = Path(source)
    is_file = path.exists() or path.suffix in (".jsonl", ".json")
    prompts = _read_jsonl(path) if is_file else _read_hub(str(source))
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


def _read_jsonl(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpeculatorError(
            f"{path}: not a readable prompt file ({error}); expected one JSON object per line. "
            "Correct the path."
        ) from error
    return _parse(((path.name, number, line) for number, line in enumerate(lines, 1)))


def _parse(lines: Iterable[tuple[str, int, str]]) -> list[Prompt]:
    prompts = []
    for name, number, line in lines:
        if not line.strip():
            continue
        try:
            prompts.append(Prompt.model_validate_json(line))
        except ValidationError as error:
            raise SpeculatorError(
                f"{name}, line {number}: {first_fault(error)}; expected an object with 'prompt' or "
                "'messages'. Correct the line."
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
    return _parse((name, number, json.dumps(row)) for number, row in enumerate(rows, 1))


def tokenize(
    prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[TokenizedPrompt]:
    """Token ids, the chat template applied where a prompt is a conversation.

    Raises:
        SpeculatorError: a prompt leaves no room for a new token in ``longest`` positions, or there
            is no chat template to apply.
    """
    tokenized = []
    for number, prompt in enumerate(prompts, 1):
        if prompt.messages:
            if tokenizer.chat_template is None:
                raise SpeculatorError(
                    f"prompt {number} is a conversation, and the verifier has no chat template. "
                    "Pass plain text under 'prompt'."
                )
            token_ids = tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, return_dict=False
            )
        else:
            token_ids = tokenizer(prompt.prompt)["input_ids"]
        if len(token_ids) >= longest:
            raise SpeculatorError(
                f"prompt {number} has {len(token_ids)} tokens, expected fewer than {longest}: the "
                "verifier's positions less the output. Shorten the prompt or the output."
            )
        tokenized.append(TokenizedPrompt(category=prompt.category, token_ids=token_ids))
    return tokenized


def hash_prompts(prompts: Iterable[TokenizedPrompt]) -> str:
    """SHA-256 over categories and token ids."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.category}\n{prompt.token_ids}\n".encode())
    return digest.hexdigest()
