"""Packed rows: several documents end to end in one row, each token beside its states."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from speculators_core.batch import PADDING, Batch
from speculators_core.verifier import LayerTaps


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


class PackedDocuments(torch.utils.data.Dataset):
    """Documents in rows of equal length, for a `DataLoader` with batch size 1."""

    def __init__(self, documents: Dataset, row_length: int):
        self.documents = documents
        self.row_length = row_length
        self.rows = list(fill_rows(map(len, documents["input_ids"]), row_length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PackedTokens:
        return pack([self.documents[i] for i in self.rows[index]], self.row_length)


def run_verifier(
    verifier: PreTrainedModel,
    tokens: PackedTokens,
    aux_layer_ids: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Batch:
    """The states of every token, each document seen alone; in ``dtype`` where one is given.

    Documents of like lengths are run one beside the other: what stands behind a document's end
    changes nothing in it, and no token is masked from all others' sight. Those of unlike lengths
    stay in their row, where Transformers keeps them apart by the restarts of ``position_ids``.
    """
    last = verifier.config.get_text_config().num_hidden_layers
    device = verifier.device
    rows = _side_by_side(tokens)
    packed = {} if rows is not None else {"position_ids": tokens.position_ids.to(device)}
    input_ids = tokens.input_ids if rows is None else tokens.input_ids[0, rows]
    with torch.no_grad(), LayerTaps(verifier, [*aux_layer_ids, last]) as taps:
        verifier.get_decoder()(input_ids=input_ids.to(device), use_cache=False, **packed)
    last_states = taps.states([last])
    states = taps.states(aux_layer_ids)
    if rows is not None:
        is_filling = torch.zeros_like(rows, dtype=torch.bool)
        is_filling[:, 1:] = rows[:, 1:] == rows[:, :-1]
        kept = (~is_filling).to(device)
        states, last_states = states[kept][None], last_states[kept][None]
    return tokens.with_states(states.to(dtype=dtype), last_states.to(dtype=dtype))


MAX_FILLING = 1.25
"""Documents are run side by side where that is at most this many times the row's tokens."""


def _side_by_side(tokens: PackedTokens) -> Int[Tensor, "documents longest"] | None:
    """The rows of each document, its last one repeated to the length of the longest.

    documents [0 0 0 1 1]  ->  [[0 1 2] [3 4 4]]
    None where there is one document, or where the filling would cost too much.
    """
    documents = tokens.document_ids[0]
    lengths = documents.unique_consecutive(return_counts=True)[1]
    longest = int(lengths.max())
    if len(lengths) == 1 or len(lengths) * longest > MAX_FILLING * len(documents):
        return None
    starts = lengths.cumsum(0) - lengths
    offsets = torch.arange(longest, device=documents.device)
    return starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)


class VerifiedDocuments(torch.utils.data.Dataset):
    """Packed rows with the verifier's states, made once and held in main memory in ``dtype``."""

    def __init__(
        self,
        rows: PackedDocuments,
        verifier: PreTrainedModel,
        aux_layer_ids: Sequence[int],
        dtype: torch.dtype | None = None,
    ):
        packed = (rows[index] for index in range(len(rows)))
        self.batches = [
            run_verifier(verifier, tokens, aux_layer_ids, dtype).to(device="cpu")
            for tokens in packed
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]
