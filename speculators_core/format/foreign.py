"""Drafts in their authors' formats: named, not read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from speculators_core.registry import MODELS

USUAL_TOKENS = 3
"""Proposed in one step where the draft's config states no number."""


@dataclass(frozen=True)
class ForeignFormat:
    """What a config without ``speculators_model_type`` is, and how vLLM serves it."""

    algorithm: str
    method: str
    """vLLM's name of it."""
    num_tokens: int

    def describe(self, name: str) -> str:
        settings = {
            "method": self.method,
            "model": name,
            "num_speculative_tokens": self.num_tokens,
        }
        return (
            f"this is {self.algorithm} in its authors' own format, which is not read here. vLLM "
            f"serves it with --speculative-config '{json.dumps(settings)}'; the public "
            "speculators package's `speculators convert` makes a speculator of it."
        )


OF_THE_PUBLIC_PACKAGE = {"dspark": "DSpark", "dflash2": "DFlash 2", "xpress": "XPress"}
"""Algorithms of the public package's format that are not read here."""
OWN_LAYERS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
"""Keys by which a language model has MTP layers."""


def unread_speculator(raw: Mapping[str, Any], name: str) -> str | None:
    """What a config is that no class here holds, in a sentence; None for one to try.

    Beside the formats of authors these are algorithms of the public package, and language models
    whose MTP layers are a draft.
    """
    if (foreign := foreign_format(raw)) is not None:
        return foreign.describe(name)
    kind = raw.get("speculators_model_type")
    is_read = kind in MODELS.names()  # by another package
    if isinstance(kind, str) and kind in OF_THE_PUBLIC_PACKAGE and not is_read:
        return (
            f"this is {OF_THE_PUBLIC_PACKAGE[kind]} (speculators_model_type {kind!r}) of the "
            "public speculators package, which is not read here. Use that package, or vLLM where "
            "it serves it."
        )
    text = raw.get("text_config")
    places = [raw, text] if isinstance(text, Mapping) else [raw]
    if kind is None and "model_type" in raw:
        if any(place.get(key) for place in places for key in OWN_LAYERS):
            settings = json.dumps({"method": "mtp", "num_speculative_tokens": USUAL_TOKENS})
            return (
                f"this is a language model (model_type {raw['model_type']!r}) with MTP layers, "
                f"not a speculator. vLLM serves it with --speculative-config '{settings}'."
            )
    return None


def foreign_format(raw: Mapping[str, Any]) -> ForeignFormat | None:
    """The format of a config that is not a speculator; None for an ordinary model."""
    if "speculators_model_type" in raw:
        return None
    architectures = " ".join(map(str, raw.get("architectures") or [])).lower()
    block_size = raw.get("block_size")
    tokens = block_size - 1 if isinstance(block_size, int) and block_size > 1 else USUAL_TOKENS
    if "dspark" in architectures:
        return ForeignFormat("DSpark", "dspark", tokens)
    if "dflash" in architectures or "dflash_config" in raw:
        return ForeignFormat("DFlash", "dflash", tokens)
    if "eagle3" in architectures or "draft_vocab_size" in raw:
        return ForeignFormat("EAGLE-3", "eagle3", USUAL_TOKENS)
    if "eagle" in architectures:
        return ForeignFormat("EAGLE", "eagle", USUAL_TOKENS)
    if "medusa" in architectures or raw.get("model_type") == "medusa":
        return ForeignFormat("Medusa", "medusa", USUAL_TOKENS)
    return None
