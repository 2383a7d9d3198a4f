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
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Queries = Float[Tensor, "batch heads queries head_dim"]
Keys = Float[Tensor, "batch kv_heads keys head_dim"]
Attend = Callable[[int, Queries, Keys, Keys], Queries]
"""(layer index, queries, keys, values of these rows) to the attended values."""

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
QUERY_BLOCK = 256
"""Queries whose scores, or whose mask, exist at one time."""
RECOMPUTE_SCORES = 2**24
"""Above so many scores the backward pass makes them again instead of keeping them, where there is
no fused kernel."""
SHORT_TRIANGLE = 64
"""Shorter documents are attended to many at a time, under a mask."""
LEAST = torch.finfo(torch.float32).min
"""Score of what is hidden: finite, so that a query that sees nothing stays finite too."""


@dataclass(frozen=True)
class Piece:
    """Queries next to each other, and the keys that any of them sees."""

    rows: slice
    keys: slice
    spans: "Spans | None" = None
    """What each query sees, counted from the first of the keys; where None, query i the first
    i + 1 keys."""

    @property
    def is_causal(self) -> bool:
        return self.spans is None

    def mask(self, dtype: torch.dtype) -> Float[Tensor, "1 1 queries keys"] | None:
        """Zero for keys that are seen, the least number for others; None where it is causal."""
        if self.spans is None:
            return None
        num_keys = self.keys.stop - self.keys.start
        hidden = self.spans.hidden(num_keys)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]


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

    @cached_property
    def pieces(self) -> list[Piece]:
        """Whole documents where each query sees one key more than the one before; else blocks."""
        triangles = self._triangles()
        if triangles is not None:
            return triangles
        return [
            Piece(rows, slice(low, high), Spans(block.first - low, block.last - low))
            for rows, block, low, high in self.blocks
            if low < high
        ]

    def _triangles(self) -> list[Piece] | None:
        num_queries = len(self.first)
        ahead = self.last - torch.arange(num_queries, device=self.first.device)
        starts = torch.ones_like(self.first, dtype=torch.bool)
        starts[1:] = (self.first[1:] != self.first[:-1]) | (ahead[1:] != ahead[:-1])
        is_first = starts & (self.last != self.first + 1)
        count = int(starts.sum())
        if bool(is_first.any()) or num_queries < count * min(SHORT_TRIANGLE, num_queries):
            return None
        rows = [*starts.nonzero().flatten().tolist(), num_queries]
        keys = self.first[starts].tolist()
        return [
            Piece(slice(low, high), slice(key, key + high - low))
            for low, high, key in zip(rows, rows[1:], keys, strict=False)
        ]

    def hidden(self, num_keys: int) -> Bool[Tensor, "queries keys"]:
        """Which of the first keys each query does not see."""
        index = torch.arange(num_keys, device=self.first.device)
        return (index < self.first[:, None]) | (index >= self.last[:, None])

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
    if queries.device.type == "cpu":
        return _attend_fused(queries, keys, values, spans, own)
    return _attend_plainly(queries, keys, values, spans, own)


# ---- by PyTorch's fused kernel ----


def _attend_fused(
    queries: Queries, keys: Keys, values: Keys, spans: Spans, own: Sequence[OwnKey]
) -> Queries:
    dtype = values.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    own_tensors = [tensor.to(dtype) for key in own for tensor in (key.keys, key.values)]
    visible = [key.is_visible for key in own]
    heads = [_heads_in_one_piece(tensor.to(dtype)) for tensor in (queries, keys, values)]
    return _FusedAttention.apply(spans, visible, *heads, *own_tensors)


def _heads_in_one_piece(tensor: Tensor) -> Tensor:
    """With the numbers of a head side by side: the kernel reads them so whatever the stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _FusedAttention(torch.autograd.Function):
    """Context by the kernel, own keys beside it, joined by the sums of their exponents.

    The backward pass of the kernel takes the sum over all keys, as if its own were a part of a
    longer row (arXiv:2310.01889), so scores of context keys are never kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spans: Spans,
        visible: Sequence[Tensor | None],
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *own: Tensor,
    ) -> Tensor:
        scale = queries.shape[-1] ** -0.5
        attended = torch.zeros_like(queries)
        exact = torch.promote_types(queries.dtype, torch.float32)
        total = torch.full(queries.shape[:-1], LEAST, dtype=exact, device=queries.device)
        for piece in spans.pieces:
            rows, seen = piece.rows, piece.keys
            attended[:, :, rows], total[:, :, rows] = flash(
                queries[:, :, rows],
                keys[:, :, seen],
                values[:, :, seen],
                is_causal=piece.is_causal,
                attn_mask=piece.mask(queries.dtype),
                scale=scale,
            )
        if own:
            scores = _own_scores(queries, own[::2], visible, exact)
            parts = torch.stack([total, *scores])  # [1 + own, batch, heads, queries]
            total = parts.logsumexp(0)
            context, *weights = (parts - total).exp().to(queries.dtype)[..., None]
            attended = attended * context
            for weight, value in zip(weights, own[1::2], strict=True):
                attended += weight * _per_head(value, queries)
        ctx.spans, ctx.visible, ctx.scale = spans, visible, scale
        ctx.save_for_backward(queries, keys, values, attended, total, *own)
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, attended, total, *own = ctx.saved_tensors
        gradient = gradients[0]
        by_queries = torch.zeros_like(queries)
        by_keys, by_values = torch.zeros_like(keys), torch.zeros_like(values)
        for piece in ctx.spans.pieces:
            rows, seen = piece.rows, piece.keys
            parts = flash_backward(
                gradient[:, :, rows],
                queries[:, :, rows],
                keys[:, :, seen],
                values[:, :, seen],
                attended[:, :, rows],
                total[:, :, rows],
                dropout_p=0.0,
                is_causal=piece.is_causal,
                attn_mask=piece.mask(queries.dtype),
                scale=ctx.scale,
            )
            by_queries[:, :, rows] += parts[0]
            by_keys[:, :, seen] += parts[1]
            by_values[:, :, seen] += parts[2]
        by_own: list[Tensor] = []
        scores = _own_scores(queries, own[::2], ctx.visible, total.dtype)
        for key, value, score in zip(own[::2], own[1::2], scores, strict=True):
            weight = (score - total).exp()[..., None]  # [batch, heads, queries, 1]
            reward = (gradient * (_per_head(value, queries) - attended)).sum(-1, keepdim=True)
            by_score = (weight * reward * ctx.scale).to(queries.dtype)
            by_queries += by_score * _per_head(key, queries)
            by_own.append(_per_kv_head(by_score * queries, key))
            by_own.append(_per_kv_head(weight.to(queries.dtype) * gradient, value))
        return None, None, by_queries, by_keys, by_values, *by_own


def _own_scores(
    queries: Queries, own_keys: Sequence[Keys], visible: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Float[Tensor, "batch heads queries"]]:
    """Scores of own keys; the least where a query has no such key."""
    scaled = queries * queries.shape[-1] ** -0.5
    scores = [(scaled * _per_head(key, queries)).sum(-1, dtype=dtype) for key in own_keys]
    return [
        score if mask is None else score.masked_fill(~mask, LEAST)
        for score, mask in zip(scores, visible, strict=True)
    ]


def _per_head(keys: Keys, queries: Queries) -> Queries:
    """Keys of groups for each of their heads."""
    return keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)


def _per_kv_head(gradient: Queries, keys: Keys) -> Keys:
    """Sums over the heads of a group."""
    return gradient.unflatten(1, (keys.shape[1], -1)).sum(2)


# ---- by single operations, where there is no such kernel ----


def _attend_plainly(
    queries: Queries, keys: Keys, values: Keys, spans: Spans, own: Sequence[OwnKey]
) -> Queries:
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
    parts = [_hide(scores, spans.hidden(num_keys))]
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
