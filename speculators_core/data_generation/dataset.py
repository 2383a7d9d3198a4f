"""`GeneratedDataset`: packed training rows from a store or queue."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from speculators_core.batch import PADDING, Batch
from speculators_core.data_generation.examples import GeneratedExample
from speculators_core.data_generation.packing import RowLayout, rows_held
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.data_generation.stores.protocols import DataSource, HoldingSource
from speculators_core.errors import SpeculatorError


def join_rows(rows: Sequence[Batch], **_: object) -> Batch:
    """Packed rows end to end in one; documents stay apart.

    document ids [0 0 1 -1] and [0 0 0 -1] -> [0 0 1 -1 2 2 2 -1]
    """
    num_documents, documents = 0, []
    for row in rows:
        documents.append(row.document_ids + (row.document_ids != PADDING) * num_documents)
        num_documents += int(row.document_ids.max()) + 1
    joined = {
        field.name: torch.cat([getattr(row, field.name) for row in rows], dim=1)
        for field in fields(Batch)
    }
    return Batch(**joined | {"document_ids": torch.cat(documents, dim=1)})


default_collate_fn_map[Batch] = join_rows  # for a DataLoader with a batch size


class GeneratedDataset(IterableDataset):
    """Packed rows of generated examples, for a `DataLoader`.

    A loader with ``batch_size=n`` gives n rows end to end, as one row; with ``batch_size=None``
    each row as it is.

    An example of a store on disk is read exactly once per epoch, over all ranks and all workers of
    the loader: consumer i of n takes every n-th example in the epoch's order. The ranks' numbers of
    examples therefore differ by at most one, but their numbers of packed rows may differ by more.
    A training loop whose ranks step together, as in DDP, should end an epoch when the first rank
    does, or run within `torch.nn.parallel.DistributedDataParallel.join`.

    A queue is read in order of arrival. An example is acknowledged when the row after it is
    requested; examples that a process had not acknowledged when it was lost go to another one. A
    loader that prefetches rows acknowledges them as it requests them, ahead of the training.

        dataset = GeneratedDataset("states", row_length=2048, shuffle_buffer=1000)
        for epoch in range(3):
            dataset.set_epoch(epoch)
            for batch in DataLoader(dataset, batch_size=None, num_workers=2): ...
    """

    def __init__(
        self,
        source: str | Path | DataSource,
        *,
        row_length: int | None = None,
        layer_ids: Sequence[int] | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        rank: int | None = None,
        num_ranks: int | None = None,
    ) -> None:
        """Opens the source and fixes the layout of its rows.

        ``row_length``: tokens per row, filled with whole examples and padded; an example longer
        than a row is truncated. None: one example per row, without padding.
        ``layer_ids``: aux layers that the draft reads; None for all stored layers.
        ``shuffle_buffer``: number of examples from which the next one is drawn; 0 keeps the order.
        For a queue it must be below its `capacity`, since buffered examples are unacknowledged.
        ``dtype``: data type of the states; None for the stored one.
        ``rank``, ``num_ranks``: None for those of `torch.distributed`.

        Raises:
            SpeculatorError: there is no such store, it lacks a state that training needs, or the
                queue is too small for ``shuffle_buffer``.
        """
        super().__init__()
        self.source: DataSource = (
            DiskStore.open(source) if isinstance(source, str | Path) else source
        )
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.epoch = 0
        if shuffle_buffer:
            _check_shuffled(self.source, shuffle_buffer)
        self.layout = RowLayout.of(self.source.schema, layer_ids, row_length, dtype)
        self.rank, self.num_ranks = _place(rank, num_ranks)

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch, which seeds the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        for row in self._rows():
            yield self.layout.pack(row)

    def _rows(self) -> Iterator[list[GeneratedExample]]:
        if not isinstance(self.source, HoldingSource):
            return self.layout.rows(self.examples())
        _check_alone()
        draws = self._draws(self.rank)
        return rows_held(self.source, lambda found: self.layout.rows(self._ordered(found, draws)))

    def examples(self) -> Iterator[GeneratedExample]:
        """The examples of this rank and worker, in the order of the epoch.

        Requesting the next example of a queue acknowledges the previous one.

        Raises:
            SpeculatorError: a shard is damaged, or a worker of the loader would read a queue.
        """
        worker = get_worker_info()
        num_workers = worker.num_workers if worker is not None else 1
        consumer = self.rank * num_workers + (worker.id if worker is not None else 0)
        draws = self._draws(consumer)
        if isinstance(self.source, DiskStore):
            found = self._striped(self.source, consumer, self.num_ranks * num_workers)
            return self._ordered(found, draws)
        _check_alone()
        if not isinstance(self.source, HoldingSource):
            return self.source.read()
        ones = rows_held(self.source, lambda held: ([e] for e in self._ordered(held, draws)))
        return (example for (example,) in ones)

    def _draws(self, consumer: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.epoch}/{consumer}")

    def _ordered(
        self, found: Iterator[GeneratedExample], draws: random.Random
    ) -> Iterator[GeneratedExample]:
        return _shuffled(found, self.shuffle_buffer, draws) if self.shuffle_buffer else found

    def _striped(self, store: DiskStore, consumer: int, count: int) -> Iterator[GeneratedExample]:
        """Every count-th example, shard by shard; shards in the epoch's order if shuffled."""
        paths = store.shard_paths()
        if self.shuffle_buffer:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(paths)
        number = 0
        for path in paths:
            shard = store.shard(path)
            for within in range((consumer - number) % count, len(shard), count):
                yield shard.read(within)
            number += len(shard)


def _check_shuffled(source: DataSource, shuffle_buffer: int) -> None:
    if isinstance(source, DiskStore):
        return
    if not isinstance(source, HoldingSource):
        raise SpeculatorError(
            f"shuffle_buffer {shuffle_buffer}: {type(source).__name__} acknowledges an example as "
            "it is read, so a buffered one would be lost with this process; expected "
            "shuffle_buffer 0. Shuffle the data sets instead, or generate to disk."
        )
    if shuffle_buffer >= source.capacity:
        raise SpeculatorError(
            f"shuffle_buffer {shuffle_buffer}: the queue holds {source.capacity} examples, "
            "expected more than the buffer. Increase sync.queue_size beyond the buffer and a row."
        )


def _check_alone() -> None:
    if get_worker_info() is not None:
        raise SpeculatorError(
            "A queue is being read in a worker of the DataLoader; expected the process that opened "
            "it. Set num_workers=0: the queue already receives in a background thread."
        )


def _place(rank: int | None, num_ranks: int | None) -> tuple[int, int]:
    if rank is None and num_ranks is None and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if (rank is None) != (num_ranks is None):
        raise ValueError(f"rank {rank}, num_ranks {num_ranks}: expected both or neither")
    rank, num_ranks = rank or 0, num_ranks or 1
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank {rank} is not in 0..{num_ranks - 1} (num_ranks {num_ranks})")
    return rank, num_ranks


def _shuffled(
    examples: Iterator[GeneratedExample], size: int, draws: random.Random
) -> Iterator[GeneratedExample]:
    """The same examples, each drawn from a buffer of the next ``size``."""
    buffer: list[GeneratedExample] = []
    for example in examples:
        if len(buffer) < size:
            buffer.append(example)
            continue
        place = draws.randrange(size)
        yield buffer[place]
        buffer[place] = example
    draws.shuffle(buffer)
    yield from buffer
