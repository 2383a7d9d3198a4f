"""Where rows come from: a store, a queue, generation beside the training, or texts.

A store and texts have numbers (`Rows`), so every epoch has an order of its own and a run that was
killed goes on at the very row. A queue is taken as it comes (`Stream`).
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.packing import RowLayout
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError
from speculators_core.training.batches import fill_rows

MAX_EVAL_SHARE = 0.1
"""Of the examples, at most so many are held out."""
REMEMBERED_ROWS = 256
"""Rows of a stream whose examples can still be named."""


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
        lengths = np.minimum(examples.lengths[np.asarray(numbers)], layout.row_length)
        places = fill_rows(lengths.tolist(), layout.row_length)
        self.rows = [[numbers[place] for place in row] for row in places]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
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


class Stream(IterableDataset):
    """Packed rows of examples as they come.

    ``open_examples`` opens the stream of an epoch, of which the first ``eval_examples`` are held
    out.
    """

    def __init__(
        self,
        open_examples: Callable[[int], Iterator[GeneratedExample]],
        layout: RowLayout,
        eval_examples: int,
        limit: int | None = None,
    ) -> None:
        self.layout = layout
        self._open = open_examples
        self._limit = limit
        self._epoch = 0
        self._examples = open_examples(0)
        self.held_out = list(islice(self._examples, eval_examples))
        self._keys: deque[tuple[int, list[str]]] = deque(maxlen=REMEMBERED_ROWS)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._epoch:
            self._examples = self._open(self._epoch)
            for _ in islice(self._examples, len(self.held_out)):
                pass
        self._epoch += 1
        trained = (example for example in self._examples if example.loss_mask.any())
        for row, examples in enumerate(self.layout.rows(islice(trained, self._limit))):
            self._keys.append((row, [example.key for example in examples]))
            yield {**vars(self.layout.pack(examples)), "row": torch.tensor([row])}

    def keys_of(self, row: int) -> list[str]:
        """Of the examples of one of the last rows; none of one that was forgotten."""
        return next((keys for number, keys in reversed(self._keys) if number == row), [])
