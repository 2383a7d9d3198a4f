"""Drafts in their authors' formats: named, not read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
