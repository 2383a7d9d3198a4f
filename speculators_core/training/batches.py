"""Packed rows: several documents end to end in one row, each token beside its states."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speculators_core.batch import PADDING, Batch


@dataclass(frozen=True)
class PackedTokens:
    """A `Batch` that the verifier has not run over yet."""

    input_ids: Int[Tensor, "batch seq"]
    document_ids: Int[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"]
    loss_mask: Bool[Tensor, "batch seq"]

    def with_states(
        self,
        hidden_states: Float[Tensor, "batch seq aux_hidden"],
        last_hidden_states: Float[Tensor, "batch seq hidden"],
    ) -> Batch:
        return Batch(
            self.input_ids,
            self.document_ids,
            self.position_ids,
            self.loss_mask,
            hidden_states,
            last_hidden_states,
        )


def pack(documents: Sequence[Mapping[str, Sequence[int]]], length: int) -> PackedTokens:
    """One row of ``length`` tokens from documents of ``input_ids`` and ``loss_mask``.

    What does not fit is cut off the last document; what is missing is padded.

    Raises:
        ValueError: a document's ``loss_mask`` has another length than its ``input_ids``.
    """
    ids: list[int] = []
    documents_of: list[int] = []
    positions: list[int] = []
    mask: list[int] = []
    for number, document in enumerate(documents):
        tokens, trained = document["input_ids"], document["loss_mask"]
        if len(tokens) != len(trained):
            raise ValueError(
                f"document {number} has {len(tokens)} input_ids and {len(trained)} loss_mask"
            )
        ids += tokens
        mask += trained
        documents_of += [number] * len(tokens)
        positions += range(len(tokens))
    missing = max(0, length - len(ids))
    return PackedTokens(
        input_ids=_row(ids + [0] * missing, length),
        document_ids=_row(documents_of + [PADDING] * missing, length),
        position_ids=_row(positions + list(range(missing)), length),
        loss_mask=_row(mask + [0] * missing, length).bool(),
    )


def _row(values: Sequence[int], length: int) -> Int[Tensor, "1 seq"]:
    return torch.tensor(values[:length], dtype=torch.long)[None]


def fill_rows(lengths: Iterable[int], row_length: int) -> Iterator[list[int]]:
    """Indices of the documents of each row, in order: a row ends where the next would not fit.

    A document longer than a row has one for itself.
    """
    row: list[int] = []
    used = 0
    for index, length in enumerate(lengths):
        if row and used + length > row_length:
            yield row
            row, used = [], 0
        row.append(index)
        used += length
    if row:
        yield row
