"""Attention of drafts, over packed rows and kept keys.

In a packed row every draft attends the same way: to a stretch of *context* keys, the same for all
queries except for its two ends, and to a few keys of the query's *own*:

    EAGLE-3    row i, step k        context 0..i        own: its keys of steps 1..k
    P-EAGLE    anchor a, depth d    context 0..a        own: its chain, depths 1..d
    DFlash     anchor p, slot s     context 0..p-1      own: the slots of its block

So no mask of rows by rows is ever made: a block of queries reads the keys between its ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Queries = Float[Tensor, "batch heads queries head_dim"]
Keys = Float[Tensor, "batch kv_heads keys head_dim"]
Attend = Callable[[int, Queries, Keys, Keys], Queries]
"""(layer index, queries, keys, values of these rows) to the attended values."""

QUERY_BLOCK = 256
"""Queries whose scores exist at one time."""
RECOMPUTE_SCORES = 2**24
"""Above so many scores the backward pass makes them again instead of keeping them."""


@dataclass(frozen=True)
class Spans:
    """The context keys ``first <= key < last`` of each query; empty where ``first >= last``."""

    first: Int[Tensor, "queries"]
    last: Int[Tensor, "queries"]

    def __getitem__(self, rows: slice | Tensor) -> "Spans":
        return Spans(self.first[rows], self.last[rows])

    @property
    def ends(self) -> tuple[int, int]:
        """The keys that any of the queries sees."""
        low, high = int(self.first.min()), int(self.last.max())
        return (low, high) if low < high else (0, 0)

    @cached_property
    def blocks(self) -> list[tuple[slice, "Spans", int, int]]:
        """Each block's queries, their spans, and the ends of the keys that it reads."""
        starts = range(0, len(self.first), QUERY_BLOCK)
        rows = [slice(start, start + QUERY_BLOCK) for start in starts]
        return [(r, self[r], *self[r].ends) for r in rows]

    @property
    def num_keys(self) -> int:
        """The keys that blocks of these queries read, in all."""
        return sum(len(block.first) * (high - low) for _, block, low, high in self.blocks)


@dataclass(frozen=True)
class OwnKey:
    """One key beside the context for every query, aligned with the queries."""

    keys: Float[Tensor, "batch kv_heads queries head_dim"]
    values: Float[Tensor, "batch kv_heads queries head_dim"]
    is_visible: Bool[Tensor, "queries"] | None = None
    """Queries that have such a key; all where None."""


def attend_packed(
    queries: Queries, keys: Keys, values: Keys, spans: Spans, own: Sequence[OwnKey] = ()
) -> Queries:
    """Scaled dot-product attention over context and own keys; heads share keys in groups."""
    blocks = []
    recompute = torch.is_grad_enabled() and queries.shape[1] * spans.num_keys > RECOMPUTE_SCORES
    own_tensors = [tensor for key in own for tensor in (key.keys, key.values)]
    for rows, block, low, high in spans.blocks:
        visible = [None if key.is_visible is None else key.is_visible[rows] for key in own]
        arguments = (
            queries[:, :, rows],
            keys[:, :, low:high],
            values[:, :, low:high],
            Spans(block.first - low, block.last - low),
            visible,
        )
        own_rows = [tensor[:, :, rows] for tensor in own_tensors]
        blocks.append(
            checkpoint(_attend_block, *arguments, *own_rows, use_reentrant=False)
            if recompute
            else _attend_block(*arguments, *own_rows)
        )
    return torch.cat(blocks, dim=2) if blocks else queries


def _attend_block(
    queries: Queries,
    keys: Keys,
    values: Keys,
    spans: Spans,
    visible: list[Tensor | None],
    *own: Tensor,
) -> Queries:
    batch, num_heads, num_queries, head_dim = queries.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    group = (batch, num_kv_heads, num_heads // num_kv_heads, num_queries, head_dim)
    grouped = queries.reshape(group) * head_dim**-0.5
    scores = grouped @ keys[:, :, None].transpose(-1, -2)  # [batch, kv, group, queries, keys]
    index = torch.arange(num_keys, device=queries.device)
    hidden = (index < spans.first[:, None]) | (index >= spans.last[:, None])
    parts = [_hide(scores, hidden)]
    own_keys, own_values = own[::2], own[1::2]
    for key, mask in zip(own_keys, visible, strict=True):
        score = (grouped * key[:, :, None]).sum(-1, keepdim=True)
        parts.append(score if mask is None else _hide(score, ~mask[:, None]))
    weights = torch.cat(parts, dim=-1).float().softmax(-1).to(values.dtype)
    attended = weights[..., :num_keys] @ values[:, :, None]
    for offset, value in enumerate(own_values):
        attended = attended + weights[..., num_keys + offset, None] * value[:, :, None]
    return attended.reshape(batch, num_heads, num_queries, head_dim)


def _hide(scores: Tensor, is_hidden: Bool[Tensor, "#queries #keys"]) -> Tensor:
    """The least finite score: a query that sees nothing stays finite too."""
    return scores.masked_fill(is_hidden, torch.finfo(scores.dtype).min)


FAR = 2**62
"""Position of padding among kept keys: after every query, so that none sees it."""


class DraftCache:
    """Keys and values of the tokens that a draft has read, each with its position.

    Rows of a batch need not have read the same number of tokens: padding is kept as well, at a
    position that no query reaches.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.positions: Int[Tensor, "batch keys"] | None = None

    @property
    def length(self) -> int:
        return 0 if self.positions is None else self.positions.shape[1]

    def extend_positions(self, positions: Int[Tensor, "batch new"]) -> None:
        """Announces the tokens whose keys every layer appends next; negative means padding."""
        positions = torch.where(positions < 0, FAR, positions)
        old = [] if self.positions is None else [self.positions]
        self.positions = torch.cat([*old, positions], dim=1)

    def append(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads new head_dim"],
        values: Float[Tensor, "batch kv_heads new head_dim"],
    ) -> tuple[Keys, Keys]:
        """All keys and values of a layer, these at the end."""
        if layer in self.layers:
            old_keys, old_values = self.layers[layer]
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        self.layers[layer] = keys, values
        return keys, values

    def crop(self, length: int) -> None:
        """Forgets all but the first ``length`` tokens."""
        if self.positions is not None and length < self.length:
            self.positions = self.positions[:, :length]
            self.layers = {
                i: (k[:, :, :length], v[:, :, :length]) for i, (k, v) in self.layers.items()
            }

    def select_rows(self, rows: Int[Tensor, "rows"]) -> None:
        """Keeps these rows of the batch alone."""
        if self.positions is not None:
            self.positions = self.positions[rows]
            self.layers = {i: (k[rows], v[rows]) for i, (k, v) in self.layers.items()}

    def visible(
        self, positions: Int[Tensor, "batch queries"], window: int | None = None
    ) -> Bool[Tensor, "batch 1 queries keys"]:
        """Each query sees the kept keys up to its own position, of a window the last of them.

        kept positions 0 1 2 FAR 3      query at 2    x x x . .
                                        query at 3    x x x . x
        """
        assert self.positions is not None
        distance = positions[:, :, None] - self.positions[:, None, :]  # [batch, queries, keys]
        mask = distance >= 0
        return (mask if window is None else mask & (distance < window))[:, None]
