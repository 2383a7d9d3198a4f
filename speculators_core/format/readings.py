"""Other ways to read a speculator's weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from speculators_core.errors import Cause


@dataclass(frozen=True)
class OtherReading:
    """Another way to read the same weights, which nothing in the checkpoint rules out."""

    cause: Cause
    """What is wrong with the checkpoint if this is how the draft was trained."""
    description: str
    """What is read differently, in words that name the key to change."""
    changes: Mapping[str, object] = field(default_factory=dict)
    """Keys of the config and their other values."""
    layer_ids: tuple[int, ...] | None = None
    """Verifier layers that the draft reads; those of the config where None."""
