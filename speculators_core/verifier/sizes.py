"""A draft's sizes, from a verifier of any family."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from speculators_core.errors import SpeculatorError
from speculators_core.format.rope import whole_heads

NAMES = {
    "hidden_size": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "num_hidden_layers": ("num_hidden_layers",),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": (
        "num_key_value_heads",
        "num_kv_heads",
        "multi_query_group_num",
        "attn_config.kv_n_heads",
    ),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels"),
    "intermediate_size": (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "ffn_hidden_size",
        "d_ff",
        "ffn_config.ffn_hidden_size",
    ),
    "max_position_embeddings": (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "context_length",
        "n_ctx",
    ),
    "rms_norm_eps": (
        "rms_norm_eps",
        "layer_norm_epsilon",
        "layer_norm_eps",
        "norm_eps",
        "norm_epsilon",
        "layernorm_epsilon",
        "rms_norm_epsilon",
    ),
    "initializer_range": ("initializer_range", "init_std"),
    "rope_theta": ("rope_theta", "rotary_emb_base", "attn_config.rope_theta"),
}
"""Each size under the names that families of Transformers give it; a dot enters a section."""
OF_EXPERTS = (
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
"""Keys by which a family has experts; its dense MLP may then have no size, or an expert's."""
HEAD_DIMS = (128, 64, 96, 80, 32, 16, 8, 4, 2)
"""Widths of a head, the first that divides the hidden size is taken where none fits."""
SERVED_ROPES = ("default", "linear", "llama3", "yarn")
"""Scalings that training and vLLM compute alike whatever the length of a text."""
LONGEST = 32_768
NORM_EPS = 1e-6
ROPE_THETA = 10_000.0


Sizes = Mapping[str, Any]
"""Keys of ``transformer_layer_config``."""


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a draft's layers; those in ``guesses`` are not the verifier's."""

    values: Sizes
    guesses: tuple[str, ...] = ()
    """Key, value and reason of each: ``intermediate_size 6144 (an expert's is 512)``."""


def read_size(text: PretrainedConfig, key: str) -> Any:
    """A size of a verifier's text config under any name; None where it states none.

    Where layers differ it is that of most of them.
    """
    return next((value for name in NAMES[key] if (value := _stated(text, name)) is not None), None)


def required_size(text: PretrainedConfig, key: str) -> int:
    """As `read_size`.

    Raises:
        SpeculatorError: the verifier states none, so it is not a language model of one stack.
    """
    value = read_size(text, key)
    if value is None:
        raise SpeculatorError(
            f"a verifier of model_type {text.model_type!r} has no {key} in its config; expected a "
            "decoder-only language model. Choose such a verifier."
        )
    return int(value)


def _stated(config: object, path: str) -> Any:
    name, _, inner = path.partition(".")
    if getattr(config, "is_heterogeneous", False):
        layers: Iterable[PretrainedConfig] = config.per_layer_config  # type: ignore[attr-defined]
        value: object = [getattr(layer, name, None) for layer in layers]
    else:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if inner and value is not None and not isinstance(value, list):
        return _stated(value, inner)
    if isinstance(value, list | tuple):
        sizes = Counter(size for size in value if isinstance(size, int | float) and size > 0)
        return sizes.most_common(1)[0][0] if sizes else None
    return value


def layer_sizes(text: PretrainedConfig, given: Sizes) -> LayerSizes:
    """Sizes of a draft for a verifier, of which ``given`` ones are taken as they are.

    Raises:
        SpeculatorError: the verifier states no width or no vocabulary.
    """
    hidden = required_size(text, "hidden_size")
    found: dict[str, object] = {
        "vocab_size": required_size(text, "vocab_size"),
        "hidden_size": hidden,
    }
    if (spread := read_size(text, "initializer_range")) is not None:
        found["initializer_range"] = spread
    reasons: dict[str, str] = {}
    for sizes, because in (
        _heads(text, hidden, given),
        _mlp(text, hidden),
        _norm(text),
        _positions(text),
        _rope(text),
    ):
        found |= sizes
        reasons |= because
    found |= given
    guesses = tuple(
        f"{key} {found[key]} ({reason})" for key, reason in reasons.items() if key not in given
    )
    return LayerSizes(found, guesses)


Found = tuple[Sizes, dict[str, str]]
"""Sizes, and the reason for each that is a guess."""


def _heads(text: PretrainedConfig, hidden: int, given: Sizes) -> Found:
    """Query heads that together have the verifier's width, as both layer types demand."""
    reasons = {}
    heads = given.get("num_attention_heads") or read_size(text, "num_attention_heads")
    width = given.get("head_dim")
    if width is None and heads is not None:
        width = read_size(text, "head_dim")
    stated_kv = None if heads is None else read_size(text, "num_key_value_heads")
    if _stated(text, "multi_query") and not _stated(text, "new_decoder_architecture"):
        stated_kv = 1
    if _stated(text, "kv_lora_rank"):  # latent attention: its heads share what they store
        width, stated_kv = given.get("head_dim") or _stated(text, "v_head_dim"), None
        heads = given.get("num_attention_heads")
    if heads is None:
        width = width if width and hidden % width == 0 else _head_dim(hidden)
        heads = hidden // width
        reasons["num_attention_heads"] = f"of {width}: the verifier has no such heads"
    elif hidden % heads and "num_attention_heads" not in given:
        stated = heads
        width = width if width and hidden % width == 0 else _head_dim(hidden)
        heads = hidden // width
        reasons["num_attention_heads"] = (
            f"of {width}: the verifier's {stated} do not divide its width {hidden}"
        )
    elif not width:
        width = hidden // heads
    if width % 2 and "head_dim" not in given:
        width += 1
        reasons["head_dim"] = "the verifier's is odd"
    kv = stated_kv
    if kv is None or heads % kv:
        is_stated = kv is None and "num_attention_heads" not in reasons
        kv = heads if is_stated or heads % 8 else 8
        if not is_stated:
            reasons["num_key_value_heads"] = "a divisor of the heads"
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": width}
    return sizes, reasons


def _head_dim(hidden: int) -> int:
    return next((width for width in HEAD_DIMS if hidden % width == 0), hidden)


def _mlp(text: PretrainedConfig, hidden: int) -> Found:
    size = read_size(text, "intermediate_size")
    if size is not None and size > hidden:
        return {"intermediate_size": int(size)}, {}
    has_experts = any(_stated(text, name) for name in OF_EXPERTS)
    if size is None and not has_experts and read_size(text, "num_attention_heads"):
        return {"intermediate_size": 4 * hidden}, {}  # where GPT-2's relatives state none
    found = "states no dense MLP" if size is None else f"has {int(size)}, an expert's"
    reason = f"three times its width: the verifier {found}"
    return {"intermediate_size": 3 * hidden}, {"intermediate_size": reason}


def _norm(text: PretrainedConfig) -> Found:
    epsilon = read_size(text, "rms_norm_eps")
    if epsilon is not None:
        return {"rms_norm_eps": float(epsilon)}, {}
    return {"rms_norm_eps": NORM_EPS}, {"rms_norm_eps": "the verifier states none"}


def _positions(text: PretrainedConfig) -> Found:
    longest = read_size(text, "max_position_embeddings")
    if longest is not None:
        return {"max_position_embeddings": int(longest)}, {}
    reason = "the verifier states none"
    return {"max_position_embeddings": LONGEST}, {"max_position_embeddings": reason}


def _rope(text: PretrainedConfig) -> Found:
    """The verifier's rotary embedding, for layers of one kind that rotate whole heads.

    Positions of a text are equal in all sections of M-RoPE: a draft needs none.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, Mapping)]
    if kinds:  # one for each kind of layer
        rope = rope.get("sliding_attention") or kinds[0]
    if "rope_theta" not in rope:
        theta = float(read_size(text, "rope_theta") or ROPE_THETA)
        reason = "the verifier states no rotary embedding"
        plain = {"rope_type": "default", "rope_theta": theta}
        return {"rope_parameters": plain}, {"rope_parameters": reason}
    plain = whole_heads(rope)
    neutral = {"type": rope.get("type"), "partial_rotary_factor": 1.0}
    dropped = sorted(key for key in rope if key not in plain and rope[key] != neutral.get(key))
    kind = plain["rope_type"]
    if kind not in SERVED_ROPES:
        plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        dropped = [kind, *dropped]
    reason = f"without the verifier's {', '.join(dropped)}"
    return {"rope_parameters": plain}, {"rope_parameters": reason} if dropped else {}
