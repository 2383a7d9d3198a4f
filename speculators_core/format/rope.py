"""Rotary keys that a draft follows."""

from collections.abc import Mapping

SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
    "proportional": ("factor", "partial_rotary_factor"),
}
"""Kinds of rotary embedding, with the keys that the network reads beside ``rope_theta``."""
SPELLINGS = {"mrope": "default", "su": "longrope"}
"""Older names of kinds. Sections of M-RoPE hold equal positions in a text."""
PARTIAL = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction", "rotary_dim")
"""Keys beside ``rope_parameters`` of which a reader could make a partial rotation."""
BLOCKS = ("rope_parameters", "rope_scaling")


def whole_heads(rope: Mapping[str, object]) -> dict[str, object]:
    """The keys of a rotary embedding that the network follows; others are left out."""
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    kind = SPELLINGS.get(kind, kind)
    if kind not in SCALING_KEYS:
        return dict(rope)  # another reader's, or a mistake: refused where it is built
    known = ("rope_theta", *SCALING_KEYS[kind])
    return {key: rope[key] for key in known if key in rope} | {"rope_type": kind}


def with_whole_heads(
    layer_config: Mapping[str, object],
) -> tuple[dict[str, object], dict[str, object]]:
    """A layers' config without rotary keys that the network does not follow, and those keys.

    {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    -> {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
       {"partial_rotary_factor": 0.25}
    """
    kept = dict(layer_config)
    left_out = {key: kept.pop(key) for key in PARTIAL if kept.get(key) is not None}
    for name in BLOCKS:
        rope = kept.get(name)
        if not isinstance(rope, Mapping):
            continue
        if any(isinstance(value, Mapping) for value in rope.values()):
            continue  # one for each kind of layer, for networks that have several
        kept[name] = followed = whole_heads(rope)
        dropped = {key: value for key, value in rope.items() if key not in followed}
        left_out |= {key: value for key, value in dropped.items() if key != "type"}
    return kept, left_out
