"""Prompts to train on and to measure on.

train.jsonl       conversations to answer
measured.jsonl    prompts by category that are not trained on

Which rows are measured depends on their text alone, so another order of the rows does not matter.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, JsonValue
from transformers import PreTrainedTokenizerBase
from xxhash import xxh64_intdigest

from speculators_core.building.settings import BuildPlan
from speculators_core.data_generation.answers.dialogues import Dialogue
from speculators_core.data_generation.answers.regenerate import read_turns
from speculators_core.data_generation.reasons import count_reasons, describe_reasons
from speculators_core.data_generation.settings import DatasetConfig
from speculators_core.data_generation.texts.open_dataset import open_rows
from speculators_core.data_generation.texts.rows import RowKind, choose_parts
from speculators_core.errors import SpeculatorError
from speculators_core.files import Roots, write_text
from speculators_core.settings import Settings
from speculators_core.texts.chat import TemplateRefused, render_chat
from speculators_core.texts.messages import MalformedRow, Message, Tool

TRAIN, MEASURED = "train.jsonl", "measured.jsonl"
MEASURED_SHARE = 10
"""At most one of so many prompts of a category is measured, but one of two at least."""
ANSWER_SHARE = 4
"""A prompt leaves this part of a document, one of so many, to the answer at least."""


class PromptsReport(Settings):
    """Counts of the prompts."""

    num_train: int
    num_measured: int
    num_answers: int
    """Turns of the assistant to answer."""
    num_tokens: int
    """Tokens of the conversations to train on up to their first answers."""
    categories: dict[str, int]
    """Prompts by category, the measured ones included."""
    set_aside: dict[str, int] = Field(default_factory=dict)
    """Rows that are not used, by reason."""


@dataclass(frozen=True)
class _Row:
    """A conversation to answer."""

    category: str
    messages: list[Message]
    tools: list[Tool] | None
    template_options: dict[str, JsonValue]
    asked: list[Message]
    """Messages up to the first answer."""
    num_tokens: int
    digest: int

    def line(self, messages: list[Message]) -> str:
        record: dict[str, object] = {"category": self.category, "messages": messages}
        if self.tools:
            record["tools"] = self.tools
        if self.template_options:
            record["chat_template_kwargs"] = self.template_options
        return f"{json.dumps(record, ensure_ascii=False)}\n"

    @property
    def num_answers(self) -> int:
        roles = ["user", *(message["role"] for message in self.messages), "user"]
        turns = zip(roles, roles[1:], strict=False)
        return max(1, sum(now == "assistant" != before for before, now in turns))


def split_prompts(
    plan: BuildPlan, max_length: int, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> PromptsReport:
    """Writes the prompts to train on and those to measure on to a folder.

    Raises:
        SpeculatorError: a data set cannot be read, or none of its rows can be used.
    """
    aside: Counter[str] = Counter()
    by_category: dict[str, dict[int, _Row]] = {}
    seen: set[int] = set()
    for row in _rows(plan, max_length, tokenizer, aside):
        if row.digest in seen:
            aside["asks what an earlier row asks"] += 1
            continue
        seen.add(row.digest)
        by_category.setdefault(row.category, {})[row.digest] = row
    reasons = count_reasons(aside)
    if not by_category:
        raise SpeculatorError(
            f"prompts.datasets: no row can be used; {describe_reasons(reasons)}. Expected prompts "
            "or conversations of text; correct the data, or `columns`."
        )
    measured: set[int] = set()
    if plan.evaluation.prompts is None and plan.evaluation.decode:
        for rows in by_category.values():
            most = max(len(rows) // MEASURED_SHARE, len(rows) > 1)
            count = min(most, plan.prompts.measured_per_category)
            measured |= set(sorted(rows)[:count])
    every = [row for rows in by_category.values() for row in rows.values()]
    train = [row for row in every if row.digest not in measured]
    folder.mkdir(parents=True, exist_ok=True)
    held_out = [row for row in every if row.digest in measured]
    write_text(folder / MEASURED, "".join(row.line(row.asked) for row in held_out))
    write_text(folder / TRAIN, "".join(row.line(row.messages) for row in train))
    return PromptsReport(
        num_train=len(train),
        num_measured=len(held_out),
        num_answers=sum(row.num_answers for row in train),
        num_tokens=sum(row.num_tokens for row in train),
        categories={name: len(rows) for name, rows in sorted(by_category.items())},
        set_aside=reasons,
    )


def _rows(
    plan: BuildPlan,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    aside: Counter[str],
) -> Iterator[_Row]:
    """Rows that can be answered within a document; the others are counted in ``aside``."""
    longest = max_length - max_length // ANSWER_SHARE
    for dataset in plan.prompts.datasets:
        for category, (messages, tools, options) in _read(plan, dataset, aside):
            asked = Dialogue("", messages, tools).messages
            if not asked:
                aside["nobody asks anything in it"] += 1
                continue
            try:
                text = render_chat(
                    tokenizer,
                    asked,
                    tools=tools,
                    options={**plan.answers.sampling.template_options, **options},
                )
            except TemplateRefused as error:
                aside[f"the chat template refuses it: {error}"] += 1
                continue
            num_tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if num_tokens > longest:
                aside[f"prompt of more than {longest} tokens, three quarters of a document"] += 1
                continue
            digest = xxh64_intdigest(text.encode())
            yield _Row(category, messages, tools, options, asked, num_tokens, digest)


def _read(
    plan: BuildPlan, dataset: DatasetConfig, aside: Counter[str]
) -> Iterator[tuple[str, tuple[list[Message], list[Tool] | None, dict[str, JsonValue]]]]:
    rows, columns = open_rows(dataset, Roots((Path.cwd(),), "the current directory"))
    where = f"{dataset.path} ({dataset.split})"
    parts = choose_parts(columns, dataset.columns, where, is_open=True)
    if parts.kind in (RowKind.TOKENS, RowKind.TEXT):
        raise SpeculatorError(
            f"{where}: {parts.kind} in {', '.join(parts.columns)}. Expected conversations or "
            "prompts: name the column with `columns.messages` or `columns.prompt`."
        )
    for number, row in enumerate(rows):
        if number == dataset.limit:
            return
        try:
            turns = read_turns(row, parts)
        except MalformedRow as error:
            aside[str(error)] += 1
            continue
        yield str(row.get(plan.prompts.category) or Path(dataset.path).stem), turns
