"""Examples from data sets: tokenised, truncated and counted."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from speculators_core.data_generation.examples import Example
from speculators_core.data_generation.settings import DataGenConfig, DatasetConfig, GenerationPlan
from speculators_core.data_generation.texts.conversations import load_chat_template, load_tokenizer
from speculators_core.data_generation.texts.digests import Digests
from speculators_core.data_generation.texts.open_dataset import open_rows
from speculators_core.data_generation.texts.rows import (
    Row,
    RowKind,
    RowParts,
    RowReader,
    choose_parts,
)
from speculators_core.data_generation.texts.spans import RowSkipped, SkipReason, TokenSequence
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import Roots

logger = logging.getLogger(__name__)

FIRST_ROWS = 100
"""Rows after which a source without any usable row is an error."""


@dataclass
class Counts:
    """Counts of rows and of the examples made from them."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    duplicates: int = 0
    skipped: Counter[SkipReason] = field(default_factory=Counter)
    """Skipped rows, and skipped further sequences of a row, by reason."""

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        return vars(self) | {"skipped": {str(r): n for r, n in self.skipped.items()}}


@dataclass(frozen=True)
class Source:
    """An opened data set, and the kind of its rows."""

    number: int
    config: DatasetConfig
    rows: Dataset | IterableDataset
    columns: tuple[str, ...]
    parts: RowParts

    @property
    def name(self) -> str:
        return f"{self.config.path} ({self.config.split})"

    @property
    def num_rows(self) -> int | None:
        """Number of rows; None where they are streamed."""
        try:
            total = len(self.rows)
        except TypeError:
            return None
        return min(total, self.config.limit or total)

    def describe(self) -> str:
        return (
            f"{self.name}: {self.parts.kind} in {', '.join(self.parts.columns)}; "
            f"its columns are {', '.join(self.columns)}"
        )


def open_sources(data: DataGenConfig, roots: Roots) -> list[Source]:
    """The data sets of a configuration, with the columns that will be read.

    Raises:
        SpeculatorError: a data set is missing, lies outside the roots, or has none of the columns
            that its mapping names.
    """
    sources = []
    for number, config in enumerate(data.datasets):
        rows, columns = open_rows(config, roots)
        is_open = data.states.tokens == "all"
        parts = choose_parts(columns, config.columns, f"{config.path} ({config.split})", is_open)
        rows = rows.select_columns(parts.columns)
        sources.append(Source(number, config, rows, tuple(columns), parts))
    return sources


def read_examples(
    data: DataGenConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    counts: Counts,
    roots: Roots,
) -> Iterator[Example]:
    """Examples of all data sets, in order; ``counts`` is updated as they are read.

    The data sets are opened by this call, their rows are read lazily. A key is
    `<data set>/<row>`, with `.<n>` for further sequences of a row.

    Raises:
        SpeculatorError: a data set or the chat template is invalid, or none of a data set's first
            rows can be used.
    """
    sources = open_sources(data, roots)
    chat = load_chat_template(data, tokenizer)
    for source in sources:
        logger.info("reading %s", source.describe())
        if source.parts.kind is RowKind.CONVERSATION and chat is None:
            raise SpeculatorError(
                f"{source.name} holds conversations, but {data.verifier} has no chat template, "
                "which they require. Name one with `data.chat_template`."
            )
    reader = RowReader(tokenizer, chat, is_open=data.states.tokens == "all")
    example_filter = _ExampleFilter(data, max_length, counts)
    return (
        example for source in sources for example in _read_source(source, reader, example_filter)
    )


def read_plan_examples(plan: GenerationPlan, counts: Counts) -> Iterator[Example]:
    """`read_examples` for a plan."""
    tokenizer = load_tokenizer(plan.data)
    roots = Roots(plan.run.allowed_roots)
    return read_examples(plan.data, tokenizer, plan.engine.max_length, counts, roots)


def count_rows(plan: GenerationPlan) -> int | None:
    """Number of rows of all data sets, at most `run.limit`; None where one is streamed."""
    sources = open_sources(plan.data, Roots(plan.run.allowed_roots))
    total = 0
    for source in sources:
        if source.num_rows is None:
            return None
        total += source.num_rows
    return min(total, plan.run.limit or total)


class _ExampleFilter:
    """Truncates sequences, and drops duplicates and those with too little to learn."""

    def __init__(self, data: DataGenConfig, max_length: int, counts: Counts) -> None:
        self.counts = counts
        self._is_open = data.states.tokens == "all"
        self._max_length = max_length
        self._min_trained = data.min_trained_tokens
        self._digests = Digests() if data.deduplicate else None

    def keep(self, key: str, sequence: TokenSequence) -> Example | None:
        """The example, or None where it is dropped; both are counted."""
        counts = self.counts
        ids, mask = sequence.input_ids[: self._max_length], sequence.loss_mask[: self._max_length]
        is_cut, num_trained = len(ids) < len(sequence.input_ids), sum(mask)
        counts.truncated += is_cut
        if is_cut and not num_trained:
            counts.skipped[SkipReason.CUT] += 1
        elif num_trained < self._min_trained and not self._is_open:
            counts.skipped[SkipReason.TOO_FEW] += 1
        elif self._digests is not None and not self._digests.add(ids):
            counts.duplicates += 1
        else:
            counts.examples += 1
            counts.tokens += len(ids)
            counts.trained_tokens += num_trained
            return Example(key, torch.tensor(ids), torch.tensor(mask))
        return None


def _read_source(
    source: Source, reader: RowReader, example_filter: _ExampleFilter
) -> Iterator[Example]:
    num_rows, fault, usable = 0, None, False
    for num_rows, row in enumerate(rows_of(source), 1):
        example_filter.counts.rows += 1
        try:
            sequences = reader.read(row, source.parts)
        except RowSkipped as skipped:
            if not example_filter.counts.skipped[skipped.reason]:
                logger.warning("%s: skipped row %d: %s", source.name, num_rows - 1, skipped)
            example_filter.counts.skipped[skipped.reason] += 1
            fault = fault or skipped
            if num_rows == FIRST_ROWS and not usable:
                break
            continue
        usable = True
        for number, sequence in enumerate(sequences):
            further = f".{number}" if number else ""
            example = example_filter.keep(f"{source.number}/{num_rows - 1}{further}", sequence)
            if example is not None:
                yield example
    if fault is not None and not usable:
        raise SpeculatorError(
            f"{source.describe()}; none of its first {num_rows} rows can be used. The first is "
            f"{fault}. Name other columns with `columns`, or another `data.chat_template`."
        ) from fault
    if num_rows == 0:
        raise SpeculatorError(
            f"{source.name} holds no rows, expected at least 1. Correct the data set's `split` or "
            "`limit`, or remove the data set."
        )


def rows_of(source: Source) -> Iterator[Row]:
    """The rows of a source.

    Raises:
        SpeculatorError: the data set is damaged, or the hub cannot be reached.
    """
    try:
        yield from islice(source.rows, source.config.limit)
    except Exception as error:  # datasets raises a dozen kinds, its own and its backends'
        raise SpeculatorError(
            f"{source.name} cannot be read further: {first_line(error)}; expected rows as its "
            "files describe them. Repair or download the data set again, then pass --run.resume "
            "to resume."
        ) from error
