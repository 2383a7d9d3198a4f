"""Generated examples packed into training rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from speculators_core.batch import PADDING, Batch
from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.stores.protocols import HoldingSource
from speculators_core.errors import SpeculatorError

Item = TypeVar("Item")


def fill_rows(
    items: Iterable[Item], length_of: Callable[[Item], int], row_length: int
) -> Iterator[list[Item]]:
    """The items of each row, in order: a row ends when it is full or the next would not fit.

    An item longer than a row gets a row to itself.
    """
    row: list[Item] = []
    used = 0
    for item in items:
        length = length_of(item)
        if row and used + length > row_length:
            yield row
            row, used = [], 0
        row.append(item)
        used += length
        if used >= row_length:
            yield row
            row, used = [], 0
    if row:
        yield row


@dataclass(frozen=True)
class RowLayout:
    """How examples are laid out in a row."""

    row_length: int | None
    """Tokens per row, padded; longer examples are truncated. None for the examples' length."""
    aux_slots: tuple[int, ...]
    """Indices, among an example's states, of the aux states that the draft reads; ascending."""
    last_slot: int
    dtype: torch.dtype | None = None
    """Data type of the states; None for the stored one."""

    @classmethod
    def of(
        cls,
        schema: Schema,
        layer_ids: Sequence[int] | None,
        row_length: int | None,
        dtype: torch.dtype | None = None,
    ) -> "RowLayout":
        """The layout for a schema's examples; ``layer_ids`` are the aux layers, None for all.

        Raises:
            SpeculatorError: the examples lack a state that training needs.
        """
        if not schema.has_last:
            raise SpeculatorError(
                f"The examples hold layers {list(schema.layer_ids)} without the last hidden state, "
                "which every draft learns from. Generate them again with data.states.last: true."
            )
        num_aux = schema.num_states - 1
        if layer_ids is None:
            return cls(row_length, tuple(range(num_aux)), num_aux, dtype)
        last = {schema.layer_ids[-1]: num_aux}
        every = {layer_id: slot for slot, layer_id in enumerate(schema.layer_ids)}
        slots = every if schema.reduce == "none" else last
        if not set(layer_ids) <= set(slots):
            what = f"layers {list(slots)}" + ("" if slots is every else " and the mean of others")
            raise SpeculatorError(
                f"The draft reads layers {list(layer_ids)}, but the examples hold {what}. "
                f"Generate them again with data.states.layer_ids {sorted(layer_ids)}."
            )
        return cls(row_length, tuple(slots[i] for i in sorted(layer_ids)), num_aux, dtype)

    def rows(self, examples: Iterable[GeneratedExample]) -> Iterator[list[GeneratedExample]]:
        """The examples of each row, in order: a row ends where the next would not fit.

        A full row is yielded before the next example is read, since a queue might have to wait.
        """
        room = self.row_length or 1  # one example per row
        return fill_rows(examples, lambda example: len(example.input_ids), room)

    def pack(self, examples: Sequence[GeneratedExample]) -> Batch:
        """Packs these examples into one row."""
        length = self.row_length or sum(len(example.input_ids) for example in examples)
        states = examples[0].hidden_states
        dtype, width = self.dtype or states.dtype, states.shape[-1]
        ids = torch.zeros(length, dtype=torch.int64)
        documents = torch.full((length,), PADDING, dtype=torch.int64)
        positions = torch.arange(length)
        mask = torch.zeros(length, dtype=torch.bool)
        aux = torch.zeros(length, len(self.aux_slots), width, dtype=dtype)
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
            for place, slot in enumerate(self.aux_slots):
                aux[own, place] = example.hidden_states[:num_tokens, slot].to(dtype)
            last[own] = example.hidden_states[:num_tokens, self.last_slot].to(dtype)
            start = end
        positions[start:] = torch.arange(length - start)
        row: list[Tensor] = [ids, documents, positions, mask, aux.flatten(1), last]
        return Batch(*(tensor[None] for tensor in row))


def rows_held(
    source: HoldingSource,
    rows_of: Callable[[Iterator[GeneratedExample]], Iterator[list[GeneratedExample]]],
) -> Iterator[list[GeneratedExample]]:
    """The rows that ``rows_of`` makes of a queue's examples.

    Requesting the next row acknowledges the examples of the previous row, and no others. When the
    queue can give no more examples until some are acknowledged, the iterator passed to ``rows_of``
    ends: its partial rows are yielded, and it is called again.

    Raises:
        SpeculatorError: an example is damaged, or producers are missing.
    """
    is_over = False
    while not is_over:
        is_over = True
        for row in rows_of(source.hold()):
            is_over = False
            yield row
            source.done(example.key for example in row)
