"""Who may look at whom in a packed row."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def causal_mask(
    query_rows: Int[Tensor, "queries"],
    key_rows: Int[Tensor, "keys"],
    window: int | None = None,
) -> Bool[Tensor, "queries keys"]:
    """Each query sees the keys up to itself; with a window, the last ``window`` of them.

    window 2    key 0 1 2 3
    query 0         x . . .
    query 1         x x . .
    query 2         . x x .
    query 3         . . x x
    """
    distance = query_rows[:, None] - key_rows[None, :]  # [queries, keys]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def packed_causal_mask(
    document_ids: Int[Tensor, "batch seq"], first: int, last: int, window: int | None = None
) -> Bool[Tensor, "batch queries keys"]:
    """`causal_mask` of rows ``first`` to ``last`` over the rows before ``last``, by document.

    documents [0 0 1 1], first 0, last 4
    query 0   x . . .
    query 1   x x . .
    query 2   . . x .
    query 3   . . x x
    """
    rows = torch.arange(last, device=document_ids.device)
    same = document_ids[:, first:last, None] == document_ids[:, None, :last]
    return same & causal_mask(rows[first:], rows, window)
