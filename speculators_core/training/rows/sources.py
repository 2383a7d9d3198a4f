"""Packed rows of numbered examples and of streams.

Examples of a store and of texts have numbers (`Rows`): every epoch has another order, and a run
that was killed resumes at the exact row. A queue is used in the order in which it arrives
(`Stream`).
"""

import random
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.lengths import Lengths
from speculators_core.data_generation.packing import RowLayout, fill_rows
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError

MAX_EVAL_SHARE = 0.1
"""Largest share of the examples that is held out."""
REMEMBERED_ROWS = 256
"""Rows of a stream whose examples can still be named."""

PackedRow = dict[str, Tensor]
"""The fields of a `Batch`, and ``row``, its number."""


class Examples(Protocol):
    """Examples by number."""

    is_stream: Literal[False]
    schema: Schema
    name: str
    """Place of the examples, for messages."""

    @property
    def lengths(self) -> Int64[np.ndarray, "examples"]:
        """Tokens of each example."""

    @property
    def num_trained(self) -> Int64[np.ndarray, "examples"]:
        """Tokens to learn of each example."""

    def key(self, number: int) -> str: ...

    def read(self, numbers: Sequence[int]) -> list[GeneratedExample]:
        """Raises SpeculatorError where one is damaged."""

    def count_tokens(self, numbers: Sequence[int]) -> Int64[Tensor, "vocab"]:
        """How often each token is one to learn."""


class StoredExamples:
    """The examples of a store on disk. A process that receives the object opens the store again."""

    is_stream: Literal[False] = False

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

    def __reduce__(self) -> tuple[type["StoredExamples"], tuple[Path]]:
        return StoredExamples, (self.folder,)

    @property
    def lengths(self) -> Int64[np.ndarray, "examples"]:
        return self._store.lengths

    @property
    def num_trained(self) -> Int64[np.ndarray, "examples"]:
        return self._num_trained

    @property
    def verifier_weights(self) -> str | None:
        """Hash of the weights of the verifier that made them; None where it was not recorded."""
        found = self._store.manifest.made_from.get("weights")
        return found if isinstance(found, str) else None

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
    """Numbers of the examples to train on, in their order, and of those that are held out."""

    train: list[int]
    held_out: list[int]

    @classmethod
    def draw(cls, examples: Examples, eval_examples: int, limit: int | None, seed: int) -> "Split":
        """A split that the seed decides; examples without a token to learn are left out.

        Raises:
            SpeculatorError: nothing is left to train on.
        """
        numbers = [int(number) for number in np.flatnonzero(examples.num_trained > 0)]
        random.Random(f"{seed}/split").shuffle(numbers)
        num_held_out = min(eval_examples, int(len(numbers) * MAX_EVAL_SHARE))
        train = numbers[num_held_out:][:limit]
        if not train:
            raise SpeculatorError(
                f"{examples.name}: none of {len(examples.lengths)} examples has a token to learn; "
                "at least one is needed. `speculators inspect` shows the loss mask."
            )
        return cls(train, sorted(numbers[:num_held_out]))


class Rows(Dataset):
    """Packed rows of numbered examples, the same in every epoch; a sampler draws their order."""

    def __init__(self, examples: Examples, numbers: Sequence[int], layout: RowLayout) -> None:
        self.examples = examples
        self.layout = layout
        assert layout.row_length is not None
        lengths = examples.lengths.tolist()
        self.rows = list(fill_rows(numbers, lengths.__getitem__, layout.row_length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> PackedRow:
        _leave_ctrl_c_to_main_process()
        examples = self.examples.read(self.rows[row])
        return {**vars(self.layout.pack(examples)), "row": torch.tensor([row])}

    def keys_of(self, row: int) -> list[str]:
        """Keys of the examples of a row."""
        return [self.examples.key(number) for number in self.rows[row]]

    @property
    def lengths(self) -> Lengths:
        """Lengths of the examples, before those longer than a row are cut."""
        return Lengths.of(self._lengths().tolist())

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows without padding."""
        assert self.layout.row_length is not None
        return int(np.minimum(self._lengths(), self.layout.row_length).sum())

    def _lengths(self) -> Int64[np.ndarray, "examples"]:
        numbers = np.concatenate([np.asarray(row) for row in self.rows])
        return self.examples.lengths[numbers]


@cache
def _leave_ctrl_c_to_main_process() -> None:
    """Ctrl-C reaches the processes that read rows ahead too; the main one still needs them."""
    if get_worker_info() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Arrivals(Protocol):
    """Examples that arrive by themselves, pass after pass."""

    is_stream: Literal[True]
    schema: Schema
    while_waiting: Callable[[], None]
    """Called every few seconds of a wait for an example; an exception from it ends the wait."""
    is_held: bool
    """Whether examples that were not reported as `done` arrive again, at this process or another.
    Where False, an example is done when the next is requested."""

    def open(self, number: int) -> None:
        """Begins a pass.

        Raises:
            SpeculatorError: there is no such pass.
        """

    def hold(self) -> Iterator[GeneratedExample]:
        """The rest of the pass; of held examples, until no more arrive before some are done.

        A call begins with the examples of earlier calls that are not done. A call that yields
        nothing means that the pass is over.

        Raises:
            SpeculatorError: the generation has failed, or is not running.
        """

    def done(self, keys: Iterable[str]) -> None:
        """These examples will not be needed again."""


class Stream(IterableDataset):
    """Packed rows of examples in the order of their arrival, one pass after another.

    All iterators over it are one: a second one continues after the rows of the first.

    The first ``eval_examples`` are held out, and left out of every later pass by their keys. At
    most ``limit`` examples of a pass are trained on. The stream ends with a pass that is empty.

    With one worker, generation yields the same examples in the same order in each pass and each
    start of a run. A resumed run therefore skips the rows that it has used, which are generated
    again, and trains on the exact next one. With several workers the order differs between passes
    and between starts, and a resumed run may hold out other examples.

    The examples of a queue are done when the step that used them is over (`mark_used`). A run that
    was killed receives the others again.
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
        self._in_use: list[str] = []
        self._keys: deque[tuple[int, list[str]]] = deque(maxlen=REMEMBERED_ROWS)
        self.lengths = Lengths()
        """Lengths of the examples of all rows so far, once for each pass."""
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
                self.lengths += Lengths.of(len(example.input_ids) for example in examples)
                yield {**vars(self.layout.pack(examples)), "row": row}
            if self._num_rows == num_before:
                return
            self._arrivals.open(number)

    @property
    def is_held(self) -> bool:
        """Whether a resumed run receives the examples that are not marked used, and no others."""
        return self._arrivals.is_held

    def mark_used(self) -> None:
        """All rows so far have been used: a queue may forget their examples."""
        self._arrivals.done(self._in_use)
        self._in_use = []

    def keys_of(self, row: int) -> list[str]:
        """Keys of the examples of one of the last rows; empty for an older row."""
        return next((keys for number, keys in reversed(self._keys) if number == row), [])

    def _rows_of_pass(self) -> Iterator[list[GeneratedExample]]:
        """The rows of one pass.

        Where a queue is full, the rows that are still in use are marked used ahead of time; if
        there are none, a row is given out before it is full.
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
                if is_at_end and self._in_use:
                    break  # its examples arrive again, and others after them
                num_given += len(row)
                if self._arrivals.is_held:
                    self._in_use += [example.key for example in row]
                yield row
            if is_over:
                return
            self.mark_used()
