"""Generated examples end to end in the rows that training takes."""

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
    """The items of each row, in order: a row ends where it is full or the next would not fit.

    One longer than a row has one for itself.
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
    """How a row is made of examples."""

    row_length: int | None
    """Tokens of a row, padded; an example longer than that is cut. None: as long as they are."""
    aux_slots: tuple[int, ...]
    """Where the aux states that the draft reads lie among an example's states, ascending."""
    last_slot: int
    dtype: torch.dtype | None = None
    """Of the states; as they are stored where None."""

    @classmethod
    def of(
        cls,
        schema: Schema,
        layer_ids: Sequence[int] | None,
        row_length: int | None,
        dtype: torch.dtype | None = None,
    ) -> "RowLayout":
        """For examples of a schema; ``layer_ids`` are the aux layers, all of them where None.

        Raises:
            SpeculatorError: the examples lack a state that training needs.
        """
        if not schema.has_last:
            raise SpeculatorError(
                "The store holds no last state, which every draft learns from: generate it with "
                "data.states.last."
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
                f"The draft reads layers {list(layer_ids)}, the store holds {what}. Generate it "
                "with data.states.layer_ids."
            )
        return cls(row_length, tuple(slots[i] for i in sorted(layer_ids)), num_aux, dtype)

    def rows(self, examples: Iterable[GeneratedExample]) -> Iterator[list[GeneratedExample]]:
        """The examples of each row, in their order: a row ends where the next would not fit.

        One that is full is given without a look at the next, for which a queue may have to wait.
        """
        room = self.row_length or 1  # an example a row
        return fill_rows(examples, lambda example: len(example.input_ids), room)

    def pack(self, examples: Sequence[GeneratedExample]) -> Batch:
        """One row of these examples."""
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

    Asking for the next row says that the one before has been dealt with, and no other. Where no
    more examples come before a row has been dealt with, ``rows_of`` sees the end of them: its last
    rows go out, and it begins anew.

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
