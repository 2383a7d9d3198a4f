"""What the engines of a measurement are asked."""

from collections.abc import Callable
from dataclasses import dataclass

Done = Callable[[], None]


@dataclass(frozen=True)
class Decoding:
    """How each prompt is continued."""

    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
