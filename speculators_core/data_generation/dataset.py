"""`GeneratedDataset`: what a store or a queue holds, as the rows that training takes."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from speculators_core.batch import PADDING, Batch
from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.protocols import DataSource
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError


class GeneratedDataset(IterableDataset):
    """Packed rows of generated examples, for a `DataLoader` with ``batch_size=None``.

    Of a store on disk each example comes exactly once an epoch, over all ranks and all workers of
    the loader together: of the epoch's order, consumer i of n takes every n-th example. A queue is
    consumed as it comes.

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
        """What is read, and how it is laid out.

        ``row_length``: tokens of a row, filled with whole examples and padded; an example longer
        than a row is cut. None: an example a row, without padding.
        ``layer_ids``: the aux layers that the draft reads; all that are stored where None.
        ``shuffle_buffer``: examples of which the next one is drawn; 0 keeps the order.
        ``dtype``: of the states; as they are stored where None.
        ``rank``, ``num_ranks``: `torch.distributed`'s where None.

        Raises:
            SpeculatorError: there is no such store, or it lacks a state that training needs.
        """
        super().__init__()
        self.source: DataSource = (
            DiskStore.open(source) if isinstance(source, str | Path) else source
        )
        self.row_length = row_length
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.dtype = dtype
        self.epoch = 0
        if shuffle_buffer and not isinstance(self.source, DiskStore):
            raise SpeculatorError(
                "A queue is not shuffled: what would wait in the buffer has been acknowledged, and "
                "is lost with this process. Shuffle the data sets, or generate to disk."
            )
        self.slots = _slots(self.source.schema, layer_ids)
        self.rank, self.num_ranks = _place(rank, num_ranks)

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        row: list[GeneratedExample] = []
        used = 0
        for example in self.examples():
            if row and (self.row_length is None or used + len(example.input_ids) > self.row_length):
                yield self._row_of(row)
                row, used = [], 0
            row.append(example)
            used += len(example.input_ids)
        if row:
            yield self._row_of(row)

    def examples(self) -> Iterator[GeneratedExample]:
        """The examples of this rank and worker, in the order of the epoch.

        Raises:
            SpeculatorError: a shard is damaged, or a worker of the loader would read a queue.
        """
        worker = get_worker_info()
        num_workers = worker.num_workers if worker is not None else 1
        consumer = self.rank * num_workers + (worker.id if worker is not None else 0)
        draws = random.Random(f"{self.seed}/{self.epoch}/{consumer}")
        if isinstance(self.source, DiskStore):
            found = self._striped(self.source, consumer, self.num_ranks * num_workers)
        elif worker is not None:
            raise SpeculatorError(
                "A queue is read in the process that opened it: set the DataLoader's num_workers "
                "to 0. Its source receives in a thread of its own."
            )
        else:
            found = self.source.read()
        return _shuffled(found, self.shuffle_buffer, draws) if self.shuffle_buffer else found

    def _striped(self, store: DiskStore, consumer: int, count: int) -> Iterator[GeneratedExample]:
        """Every count-th example, shard by shard; the shards in the epoch's order if shuffled."""
        paths = store.shard_paths()
        if self.shuffle_buffer:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(paths)
        number = 0
        for path in paths:
            shard = store.shard(path)
            for within in range((consumer - number) % count, len(shard), count):
                yield shard.read(within)
            number += len(shard)

    def _row_of(self, examples: Sequence[GeneratedExample]) -> Batch:
        """One row of these examples, end to end."""
        length = self.row_length or sum(len(example.input_ids) for example in examples)
        states = examples[0].hidden_states
        dtype = self.dtype or states.dtype
        aux_slots, last_slot = self.slots
        width = states.shape[-1]
        ids = torch.zeros(length, dtype=torch.int64)
        documents = torch.full((length,), PADDING, dtype=torch.int64)
        positions = torch.arange(length)
        mask = torch.zeros(length, dtype=torch.bool)
        aux = torch.zeros(length, len(aux_slots), width, dtype=dtype)
        last = torch.zeros(length, width, dtype=dtype)
        start = 0
        for number, example in enumerate(examples):
            end = min(start + len(example.input_ids), length)
            own = slice(start, end)
            num_tokens = end - start
            ids[own] = example.input_ids[:num_tokens]
            documents[own] = number
            positions[own] = torch.arange(num_tokens)
            mask[own] = example.loss_mask[:num_tokens]
            for place, slot in enumerate(aux_slots):
                aux[own, place] = example.hidden_states[:num_tokens, slot].to(dtype)
            last[own] = example.hidden_states[:num_tokens, last_slot].to(dtype)
            start = end
        positions[start:] = torch.arange(length - start)
        row: list[Tensor] = [ids, documents, positions, mask, aux.flatten(1), last]
        return Batch(*(tensor[None] for tensor in row))


def _slots(schema: Schema, layer_ids: Sequence[int] | None) -> tuple[list[int], int]:
    """Where the aux states and the last state lie among an example's states."""
    if not schema.has_last:
        raise SpeculatorError(
            "The store holds no last state, which every draft learns from: generate it with "
            "data.states.last."
        )
    num_aux = schema.num_states - 1
    if layer_ids is None:
        return list(range(num_aux)), num_aux
    stored = list(schema.layer_ids[:-1])
    if schema.reduce != "none" or not set(layer_ids) <= set(stored):
        what = "their mean alone" if schema.reduce != "none" else f"layers {stored}"
        raise SpeculatorError(
            f"The draft reads layers {list(layer_ids)}, the store holds {what}. Generate it with "
            "data.states.layer_ids."
        )
    return [stored.index(layer_id) for layer_id in sorted(layer_ids)], num_aux


def _place(rank: int | None, num_ranks: int | None) -> tuple[int, int]:
    if rank is None and num_ranks is None and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if (rank is None) != (num_ranks is None):
        raise ValueError(f"rank {rank} of {num_ranks}: both or neither")
    rank, num_ranks = rank or 0, num_ranks or 1
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank {rank} of {num_ranks}")
    return rank, num_ranks


def _shuffled(
    examples: Iterator[GeneratedExample], size: int, draws: random.Random
) -> Iterator[GeneratedExample]:
    """The same examples; each is drawn from the next ``size`` that are there."""
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
