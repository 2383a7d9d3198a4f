"""Decoder layers of drafts, without the attention step.

Transformers' modules hold the weights, the norms and the rotary embedding. The algorithms differ
in the keys that a query sees, so a caller passes that step as an ``Attend``.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

from speculators_core.errors import SpeculatorError
from speculators_core.models.parts.attention import (
    Attend,
    DraftCache,
    Keys,
    OwnKey,
    Queries,
    attend_packed,
)
from speculators_core.models.parts.masks import document_starts, spans_before

Hidden = Float[Tensor, "batch seq hidden"]
Rotary = tuple[Tensor, Tensor]
TransformersLayer: TypeAlias = LlamaDecoderLayer | Qwen2DecoderLayer | Qwen3DecoderLayer
TransformersAttention: TypeAlias = LlamaAttention | Qwen2Attention | Qwen3Attention


class DraftLayer(nn.Module):
    """A draft's layer that is made of the modules of one of Transformers' layers, and others."""

    input_layernorm: nn.Module
    self_attn: TransformersAttention
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    gradient_checkpointing = False  # Transformers switches it, as in its layers


Layer: TypeAlias = TransformersLayer | DraftLayer


@dataclass(frozen=True)
class Family:
    """The Transformers modules of one architecture."""

    decoder_layer: type[TransformersLayer]
    norm: type[nn.Module]
    rotary: type[nn.Module]


FAMILIES = {
    "llama": Family(
        LlamaDecoderLayer,
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaRotaryEmbedding,
    ),
    "qwen2": Family(
        Qwen2DecoderLayer,
        modeling_qwen2.Qwen2RMSNorm,
        modeling_qwen2.Qwen2RotaryEmbedding,
    ),
    "qwen3": Family(
        Qwen3DecoderLayer,
        modeling_qwen3.Qwen3RMSNorm,
        modeling_qwen3.Qwen3RotaryEmbedding,
    ),
}


QWEN3_SHAPE = {
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "rope_parameters",
}
"""What Qwen3's layers cannot do without."""


def family_of(config: PretrainedConfig, allowed: Collection[str] = tuple(FAMILIES)) -> Family:
    """Raises SpeculatorError where the algorithm has no layers for the config's ``model_type``."""
    if config.model_type not in allowed:
        raise SpeculatorError(
            f"transformer_layer_config.model_type {config.model_type!r} has no draft layers; "
            f"expected one of {', '.join(allowed)}. Correct model_type."
        )
    return FAMILIES[config.model_type]


def as_qwen3(config: PretrainedConfig) -> Qwen3Config:
    """The config of Qwen3's layers in the shape of another family's.

    Raises:
        SpeculatorError: the other config lacks a size that the layers need.
    """
    if isinstance(config, Qwen3Config):
        return config
    own = {f.name for f in fields(Qwen3Config)} - {f.name for f in fields(PretrainedConfig)}
    shape = {key: getattr(config, key) for key in own if hasattr(config, key)}
    if missing := QWEN3_SHAPE - shape.keys():
        raise SpeculatorError(
            f"transformer_layer_config.model_type {config.model_type!r} has no "
            f"{', '.join(sorted(missing))}, which the draft's layers need. Use llama or qwen3."
        )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return Qwen3Config(**{**shape, "layer_types": kinds})


def sliding_window(config: PretrainedConfig, layer: int) -> int | None:
    """Keys that a query of this layer sees, itself included; None for all."""
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds[layer] != "sliding_attention":
        return None
    return config.sliding_window


class InputLayer(DraftLayer):
    """EAGLE-3's first layer: attends over embedding and hidden state side by side.

    Its weights are a decoder layer's, but that queries, keys and values read two widths.
    """

    def __init__(self, config: PretrainedConfig, norm_before_residual: bool):
        super().__init__()
        family = family_of(config)
        layer = family.decoder_layer(config, 0)
        self.self_attn = layer.self_attn
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
        return hidden + feed_forward(self, hidden)


def feed_forward(layer: Layer, hidden: Hidden) -> Hidden:
    """Norm and MLP of a layer; with gradient checkpointing the backward pass recomputes them."""
    if layer.gradient_checkpointing and layer.training:
        return checkpoint(_feed_forward, layer, hidden, use_reentrant=False)
    return _feed_forward(layer, hidden)


def _feed_forward(layer: Layer, hidden: Hidden) -> Hidden:
    return layer.mlp(layer.post_attention_layernorm(hidden))


def decoder_layer(
    layer: Layer, index: int, hidden: Hidden, rotary: Rotary, attend: Attend
) -> Hidden:
    """An ordinary pre-norm layer."""
    normed = layer.input_layernorm(hidden)
    hidden = hidden + attention(layer.self_attn, index, normed, rotary, attend)
    return hidden + feed_forward(layer, hidden)


def attention(
    module: TransformersAttention,
    index: int,
    x: Float[Tensor, "batch seq width"],
    rotary: Rotary,
    attend: Attend,
) -> Hidden:
    """Projects, norms and rotates as the module does, attends as the caller does."""
    queries = module.q_proj(x).view(*x.shape[:-1], -1, module.head_dim)
    if hasattr(module, "q_norm"):
        queries = module.q_norm(queries)
    keys, values = keys_and_values(module, x, rotary)
    attended = attend(index, rotate(queries, rotary), keys, values)
    attended = attended.transpose(1, 2)  # [batch, seq, heads, head_dim]
    return module.o_proj(attended.reshape(*x.shape[:-1], -1))


def keys_and_values(module: TransformersAttention, x: Hidden, rotary: Rotary) -> tuple[Keys, Keys]:
    """What an attention module lets others see of ``x``."""
    shape = (*x.shape[:-1], -1, module.head_dim)
    keys = module.k_proj(x).view(shape)
    if hasattr(module, "k_norm"):
        keys = module.k_norm(keys)
    return rotate(keys, rotary), module.v_proj(x).view(shape).transpose(1, 2)


def rotate(x: Float[Tensor, "batch seq heads head_dim"], rotary: Rotary) -> Queries:
    """Rotary positions (arXiv:2104.09864), and heads before tokens."""
    cos, sin = rotary
    x = x.transpose(1, 2)
    return x * cos[:, None] + modeling_llama.rotate_half(x) * sin[:, None]


def cached_attend(
    config: PretrainedConfig, cache: DraftCache, positions: Int[Tensor, "batch new"]
) -> Attend:
    """Attends to the kept keys up to each token's position, and keeps these ones too."""
    cache.extend_positions(positions)

    def attend(layer: int, queries: Queries, keys: Keys, values: Keys) -> Queries:
        keys, values = cache.append(layer, keys, values)
        mask = cache.visible(positions, sliding_window(config, layer))
        return nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=True
        )

    return attend


class UnrolledAttention:
    """Attention of a training unroll over a packed row, as the drafts are served.

    At step k a row sees the step-0 keys of its document up to itself, and of each later step its
    own key alone. Row 2 of one document at step 2:

        step-0 keys  0 1 2 3    step-1 keys  0 1 2    step-2 keys  0 1 2
                     x x x .                 . . x                 . . x
        window of 3  . . x .                 . . x                 . . x

    Step k may have fewer rows than step k - 1: the last ones have no further token.
    """

    def __init__(self, config: PretrainedConfig, document_ids: Int[Tensor, "rows"]):
        self.config = config
        self.starts = document_starts(document_ids)
        # Layer to the keys and values of each step.
        self.steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, layer: int, queries: Queries, keys: Keys, values: Keys) -> Queries:
        steps = self.steps.setdefault(layer, [])
        steps.append((keys, values))
        (context, context_values), *later = steps
        num_rows = queries.shape[2]
        ends = torch.arange(1, num_rows + 1, device=queries.device)
        window = sliding_window(self.config, layer)
        spans = spans_before(ends, self.starts[:num_rows], len(later), window)
        near = later if window is None else later[-window:]
        own = [OwnKey(k[:, :, :num_rows], v[:, :, :num_rows]) for k, v in near]
        return attend_packed(queries, context, context_values, spans, own)
