"""Where rows come from: a store, a queue, generation beside the training, or texts.

A store and texts have numbers (`Rows`), so every epoch has an order of its own and a run that was
killed goes on at the very row. A queue is taken as it comes (`Stream`).
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.packing import RowLayout, fill_rows
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError

MAX_EVAL_SHARE = 0.1
"""Of the examples, at most so many are held out."""
REMEMBERED_ROWS = 256
"""Rows of a stream whose examples can still be named."""

PackedRow = dict[str, Tensor]
"""The fields of a `Batch`, and ``row``, its number."""


class Examples(Protocol):
    """Examples by number."""

    schema: Schema
    name: str
    """Where they are, for messages."""

    @property
    def lengths(self) -> Int64[np.ndarray, "examples"]:
        """Tokens of each."""

    @property
    def num_trained(self) -> Int64[np.ndarray, "examples"]:
        """Tokens to learn of each."""

    def key(self, number: int) -> str: ...

    def read(self, numbers: Sequence[int]) -> list[GeneratedExample]:
        """Raises SpeculatorError where one is damaged."""

    def count_tokens(self, numbers: Sequence[int]) -> Int64[Tensor, "vocab"]:
        """How often each token is one to learn."""


class StoredExamples:
    """Of a store on disk. Another process opens the store anew."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        SpeculatorError: there is no store, or it holds nothing.
        """
        self.folder = folder
        self.name = str(folder)
        self._open()
        if len(self._store) == 0:
            raise SpeculatorError(
                f"{folder} holds no examples. Generate some with `speculators generate-data`."
            )

    def _open(self) -> None:
        self._store = DiskStore.open(self.folder)
        self.schema = self._store.schema
        index = self._store.index
        self._keys = index.column("key")
        self._num_trained = index.column("num_trained").to_numpy().astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def lengths(self) -> Int64[np.ndarray, "examples"]:
        return self._store.lengths

    @property
    def num_trained(self) -> Int64[np.ndarray, "examples"]:
        return self._num_trained

    @property
    def made_from(self) -> dict[str, Any]:
        return self._store.manifest.made_from

    def key(self, number: int) -> str:
        return self._keys[number].as_py()

    def read(self, numbers: Sequence[int]) -> list[GeneratedExample]:
        return [self._store[number] for number in numbers]

    def count_tokens(self, numbers: Sequence[int]) -> Int64[Tensor, "vocab"]:
        counts = torch.zeros(self.schema.vocab_size, dtype=torch.int64)
        for number in sorted(numbers):
            example = self._store[number]
            counts += example.input_ids[example.loss_mask].bincount(minlength=len(counts))
        return counts


@dataclass(frozen=True)
class Split:
    """Which examples are trained on, in their order, and which are held out."""

    train: list[int]
    held_out: list[int]

    @classmethod
    def draw(cls, examples: Examples, eval_examples: int, limit: int | None, seed: int) -> "Split":
        """By the seed; examples without a token to learn are left out.

        Raises:
            SpeculatorError: nothing is left to train on.
        """
        numbers = [int(number) for number in np.flatnonzero(examples.num_trained > 0)]
        random.Random(f"{seed}/split").shuffle(numbers)
        num_held_out = min(eval_examples, int(len(numbers) * MAX_EVAL_SHARE))
        train = numbers[num_held_out:][:limit]
        if not train:
            raise SpeculatorError(
                f"{examples.name} has {len(examples.lengths)} examples, and none with a token to "
                "learn. See `speculators inspect`."
            )
        return cls(train, sorted(numbers[:num_held_out]))


class Rows(Dataset):
    """Packed rows of numbered examples, the same in every epoch; a sampler draws their order.

    Item n has the fields of a `Batch`, and ``row``, its number.
    """

    def __init__(self, examples: Examples, numbers: Sequence[int], layout: RowLayout) -> None:
        self.examples = examples
        self.layout = layout
        assert layout.row_length is not None
        lengths = examples.lengths.tolist()
        self.rows = list(fill_rows(numbers, lengths.__getitem__, layout.row_length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> PackedRow:
        examples = self.examples.read(self.rows[row])
        return {**vars(self.layout.pack(examples)), "row": torch.tensor([row])}

    def keys_of(self, row: int) -> list[str]:
        """Of the examples of a row."""
        return [self.examples.key(number) for number in self.rows[row]]

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        assert self.layout.row_length is not None
        numbers = np.concatenate([np.asarray(row) for row in self.rows])
        return int(np.minimum(self.examples.lengths[numbers], self.layout.row_length).sum())


class Arrivals(Protocol):
    """Examples that come by themselves, pass after pass."""

    schema: Schema
    while_waiting: Callable[[], None]
    """Called every few seconds of a wait for an example; what it raises ends the wait."""
    is_held: bool
    """Whether those that nobody called `done` come again, to this process or to another; else one
    is done when the next is asked for."""

    def open(self, number: int) -> None:
        """Begins a pass.

        Raises:
            SpeculatorError: there is no such pass.
        """

    def hold(self) -> Iterator[GeneratedExample]:
        """The rest of the pass; where they are held, until no more come before some are done.

        A call begins with those that an earlier one gave and that are not done; one that gives
        none says that the pass is over.

        Raises:
            SpeculatorError: whoever makes them has failed, or is not there.
        """

    def done(self, keys: Iterable[str]) -> None:
        """These will not be needed again."""


class Stream(IterableDataset):
    """Packed rows of examples as they come, without an end: after a pass the next one begins.

    It is one iterator: who asks for it again gets the rows after those that were given.

    The first ``eval_examples`` are held out, and left out of every later pass by their keys.
    ``limit`` examples of a pass are trained on, at most. A pass without any is the end.

    With one worker generation gives the same examples in the same order in each pass and each
    start of a run, so a run that goes on skips the rows that it has used and trains on the very
    next; they are generated again for that. Several workers deliver as they come: examples then
    have another order in each pass and each start, and a run that goes on may hold out others.

    What a queue sends is done when the step that it was used in is over: `settle`. A run that was
    killed gets the rest again.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        layout: RowLayout,
        eval_examples: int,
        limit: int | None = None,
    ) -> None:
        self.layout = layout
        self._arrivals = arrivals
        self._limit = limit
        self._num_rows = 0
        self._unsettled: list[str] = []
        self._keys: deque[tuple[int, list[str]]] = deque(maxlen=REMEMBERED_ROWS)
        self.held_out: list[GeneratedExample] = []
        arrivals.open(0)
        for example in islice(arrivals.hold(), eval_examples):
            self.held_out.append(example)
            arrivals.done([example.key])
        self._held_out_keys = {example.key for example in self.held_out}
        self._rows = self._endless_rows()

    def __iter__(self) -> Iterator[PackedRow]:
        return self._rows

    def _endless_rows(self) -> Iterator[PackedRow]:
        for number in count(1):
            num_before = self._num_rows
            for examples in self._rows_of_pass():
                self._keys.append((self._num_rows, [example.key for example in examples]))
                row = torch.tensor([self._num_rows])
                self._num_rows += 1
                yield {**vars(self.layout.pack(examples)), "row": row}
            if self._num_rows == num_before:
                return
            self._arrivals.open(number)

    def settle(self) -> None:
        """All rows so far have been used: a queue may forget their examples."""
        self._arrivals.done(self._unsettled)
        self._unsettled = []

    def keys_of(self, row: int) -> list[str]:
        """Of the examples of one of the last rows; none of one that was forgotten."""
        return next((keys for number, keys in reversed(self._keys) if number == row), [])

    def _rows_of_pass(self) -> Iterator[list[GeneratedExample]]:
        """Where a queue has no room for more, rows that are not used yet are settled ahead of time,
        and if there are none a row goes out before it is full.
        """
        num_given, is_at_end = 0, False

        def trained() -> Iterator[GeneratedExample]:
            nonlocal is_at_end
            for example in self._arrivals.hold():
                if example.loss_mask.any() and example.key not in self._held_out_keys:
                    yield example
                else:
                    self._arrivals.done([example.key])
            is_at_end = True

        while True:
            is_at_end, is_over = False, True
            left = None if self._limit is None else self._limit - num_given
            for row in self.layout.rows(islice(trained(), left)):
                is_over = False
                if is_at_end and self._unsettled:
                    break  # its examples come again, and others after them
                num_given += len(row)
                if self._arrivals.is_held:
                    self._unsettled += [example.key for example in row]
                yield row
            if is_over:
                return
            self.settle()
