"""Masks of packed rows, as stretches of keys."""

import torch
from jaxtyping import Int
from torch import Tensor

from speculators_core.models.parts.attention import Spans


def document_starts(document_ids: Int[Tensor, "seq"]) -> Int[Tensor, "seq"]:
    """The row in which each row's document starts.

    documents [0 0 0 1 1]  ->  [0 0 0 3 3]
    """
    rows = torch.arange(len(document_ids), device=document_ids.device)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[1:] = document_ids[1:] != document_ids[:-1]
    return torch.where(starts, rows, 0).cummax(0).values


def spans_before(
    ends: Int[Tensor, "queries"],
    starts: Int[Tensor, "queries"],
    reach: Int[Tensor, "queries"] | int = 0,
    window: int | None = None,
) -> Spans:
    """The keys before ``ends`` in the queries' documents, which start at ``starts``.

    A query lies ``reach`` tokens after the key before its end; a window counts back from there,
    the query itself included.

    documents [0 0 0 1 1], ends = row + 1      and with a window of 2
    query 0   x . . . .                         x . . . .
    query 1   x x . . .                         x x . . .
    query 2   x x x . .                         . x x . .
    query 3   . . . x .                         . . . x .
    query 4   . . . x x                         . . . x x
    """
    first = starts if window is None else torch.maximum(starts, ends + reach - window)
    return Spans(first, ends)
