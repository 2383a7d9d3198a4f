"""Drafts whose positions end before the engine's."""

import logging
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

logger = logging.getLogger(__name__)

METHODS = ("eagle", "eagle3", "dflash", "dspark", "mtp")
"""Drafts that read the verifier's positions."""
EXTENDABLE = ("default", "linear", "llama3")
"""Rotary embeddings whose table has as many rows as there are positions; those of the other kinds
depend on that number, or do not."""


def follow_served_length(config: "SpeculativeConfig", served: int) -> None:
    """Extends a draft's positions to the served length, or warns that it cannot.

    vLLM 0.32 extends an EAGLE draft's rotary table, and no other; and it drafts nothing for a batch
    that has one request longer than the draft's own maximum.
    """
    draft = config.draft_model_config
    if config.method not in METHODS or config.max_model_len is not None or draft is None:
        return
    own = draft.max_model_len
    if own >= served:
        return
    if not can_extend(draft.hf_config):
        logger.warning(
            "%s has %d positions (max_position_embeddings), the engine serves %d: nothing is "
            "drafted for a batch with a longer request. Serve with --max-model-len %d, or train a "
            "draft for more positions.",
            config.model,
            own,
            served,
            own,
        )
        return
    logger.warning(
        "%s has %d positions (max_position_embeddings), the engine serves %d: its rotary "
        "embeddings were extended. Further tokens are drafted too, maybe worse.",
        config.model,
        own,
        served,
    )
    for hf_config in (draft.hf_config, draft.hf_text_config):
        hf_config.max_position_embeddings = max(hf_config.max_position_embeddings, served)
    draft.max_model_len = served


def can_extend(config: PretrainedConfig) -> bool:
    """Whether more positions leave the rotary embeddings of the first ones as they are."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [inner for inner in rope.values() if isinstance(inner, dict)]
    kinds = {one.get("rope_type", "default") for one in by_layer or [rope]}
    return kinds <= set(EXTENDABLE)
