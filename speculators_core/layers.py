"""Decoder layers of a draft: Transformers' own modules, with the attention step left open.

Transformers' modules hold the weights, the norms and the rotary embedding. Which keys a query sees
is what the algorithms differ in, so a caller hands in that step as an ``Attend``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from speculators_core.errors import SpeculatorError
from speculators_core.masks import causal_mask, packed_causal_mask

Queries = Float[Tensor, "batch heads queries head_dim"]
Keys = Float[Tensor, "batch kv_heads keys head_dim"]
Hidden = Float[Tensor, "batch seq hidden"]
Rotary = tuple[Tensor, Tensor]
Attend = Callable[[int, Queries, Keys, Keys], Queries]
"""(layer index, queries, keys, values of these rows) to the attended values."""

QUERY_BLOCK = 256
"""Rows whose scores are computed at one time, against the keys up to their last."""


@dataclass(frozen=True)
class Family:
    """The Transformers modules of one architecture."""

    decoder_layer: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]


FAMILIES = {
    "llama": Family(
        modeling_llama.LlamaDecoderLayer,
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaRotaryEmbedding,
    ),
    "qwen3": Family(
        modeling_qwen3.Qwen3DecoderLayer,
        modeling_qwen3.Qwen3RMSNorm,
        modeling_qwen3.Qwen3RotaryEmbedding,
    ),
}


def family_of(config: PretrainedConfig) -> Family:
    """Raises SpeculatorError where we have no layers for the config's ``model_type``."""
    if config.model_type not in FAMILIES:
        raise SpeculatorError(
            f"transformer_layer_config.model_type {config.model_type!r} has no draft layers; "
            f"known: {', '.join(FAMILIES)}."
        )
    return FAMILIES[config.model_type]


def sliding_window(config: PretrainedConfig, layer: int) -> int | None:
    """Keys that a query of this layer sees, itself included; None for all."""
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds[layer] != "sliding_attention":
        return None
    return config.sliding_window


class InputLayer(nn.Module):
    """EAGLE-3's first layer: attends over embedding and hidden state side by side.

    Its weights are a decoder layer's, but that queries, keys and values read two widths.
    """

    def __init__(self, config: PretrainedConfig, norm_before_residual: bool):
        super().__init__()
        family = family_of(config)
        layer: Any = family.decoder_layer(config, 0)
        self.self_attn: Any = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            wide = nn.Linear(
                2 * config.hidden_size, narrow.out_features, bias=narrow.bias is not None
            )
            setattr(self.self_attn, name, wide)
        self.mlp = layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.hidden_norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.norm_before_residual = norm_before_residual

    def forward(self, embedding: Hidden, hidden: Hidden, rotary: Rotary, attend: Attend) -> Hidden:
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        both = torch.cat(
            [self.input_layernorm(embedding), normed], dim=-1
        )  # [batch, seq, 2 hidden]
        hidden = residual + attention(self.self_attn, 0, both, rotary, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def decoder_layer(layer: Any, index: int, hidden: Hidden, rotary: Rotary, attend: Attend) -> Hidden:
    """An ordinary pre-norm layer."""
    normed = layer.input_layernorm(hidden)
    hidden = hidden + attention(layer.self_attn, index, normed, rotary, attend)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def attention(module: Any, index: int, x: Tensor, rotary: Rotary, attend: Attend) -> Hidden:
    """Projects, norms and rotates as the module says, attends as the caller says."""
    shape = (*x.shape[:-1], -1, module.head_dim)
    queries, keys = module.q_proj(x).view(shape), module.k_proj(x).view(shape)
    if hasattr(module, "q_norm"):
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    values = module.v_proj(x).view(shape).transpose(1, 2)
    queries, keys = modeling_llama.apply_rotary_pos_emb(
        queries.transpose(1, 2), keys.transpose(1, 2), *rotary
    )
    attended = attend(index, queries, keys, values).transpose(1, 2)  # [batch, seq, heads, head_dim]
    return module.o_proj(attended.reshape(*x.shape[:-1], -1))


def cached_attend(config: PretrainedConfig, cache: Cache, past_length: int) -> Attend:
    """Attends to all rows in the cache, and appends these to it."""

    def attend(layer: int, queries: Queries, keys: Keys, values: Keys) -> Queries:
        keys, values = cache.update(keys, values, layer)
        window = sliding_window(config, layer)
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        mask = None
        if num_queries > 1 or window is not None:
            rows = torch.arange(num_keys, device=queries.device)
            mask = causal_mask(rows[past_length:], rows, window)
        return nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=True
        )

    return attend


class UnrolledAttention:
    """Attention of EAGLE-3's training unroll over a packed row.

    At step k a row sees the step-0 keys of its document up to itself, and of each later step its
    own key alone. Row 2 of one document at step 2:

        step-0 keys  0 1 2 3    step-1 keys  0 1 2    step-2 keys  0 1 2
                     x x x .                 . . x                 . . x

    Step k has one row less than step k - 1: the last has no further token.
    """

    def __init__(self, config: PretrainedConfig, document_ids: Int[Tensor, "batch rows"]):
        self.config = config
        self.document_ids = document_ids
        # Layer to the keys and values of each step; each step has a row less.
        self.steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, layer: int, queries: Queries, keys: Keys, values: Keys) -> Queries:
        steps = self.steps.setdefault(layer, [])
        steps.append((keys, values))
        window = sliding_window(self.config, layer)
        num_rows = queries.shape[2]
        blocks = [
            self._block(queries, steps, first, min(first + QUERY_BLOCK, num_rows), window)
            for first in range(0, num_rows, QUERY_BLOCK)
        ]
        return torch.cat(blocks, dim=2)

    def _block(
        self,
        queries: Queries,
        steps: list[tuple[Tensor, Tensor]],
        first: int,
        last: int,
        window: int | None,
    ) -> Float[Tensor, "batch heads block head_dim"]:
        batch, num_heads, _, head_dim = queries.shape
        num_kv_heads = steps[0][0].shape[1]
        grouped = (batch, num_kv_heads, num_heads // num_kv_heads, last - first, head_dim)
        block = queries[:, :, first:last].reshape(grouped) * head_dim**-0.5
        (keys, values), later = steps[0], steps[1:]
        mask = packed_causal_mask(self.document_ids, first, last, window)[:, None, None]
        scores = block @ keys[:, :, None, :last].transpose(-1, -2)  # [batch, kv, group, rows, keys]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        own = [(block * k[:, :, None, first:last]).sum(-1, keepdim=True) for k, _ in later]
        weights = torch.cat([scores, *own], dim=-1).float().softmax(-1).to(values.dtype)
        attended = weights[..., :last] @ values[:, :, None, :last]
        for step, (_, v) in enumerate(later):
            attended = attended + weights[..., last + step, None] * v[:, :, None, first:last]
        return attended.reshape(batch, num_heads, last - first, head_dim)
