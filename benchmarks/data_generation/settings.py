"""Options of the data generation benchmark."""

from typing import Annotated, Literal

from pydantic import Field

from speculators_core.flags import Several
from speculators_core.settings import Settings

QueueKind = Literal["mp_queue", "zmq"]
Part = Literal["engine", "disk", "queues", "memory"]


class DataBenchmarkConfig(Settings):
    """Measurements and their sizes."""

    parts: Annotated[tuple[Part, ...], Several, Field(min_length=1)] = (
        "engine",
        "disk",
        "queues",
        "memory",
    )
    """Measurements."""
    verifier: str | None = None
    """Verifier of engine, queues and memory; the playground's if None."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the verifier's weights."""
    texts: int = Field(64, ge=8)
    """Texts that an engine runs in one measurement."""
    length: int = Field(256, ge=8)
    """Tokens of each text."""
    runs: int = Field(5, ge=1)
    """Turns of each measurement; the median counts."""
    megabytes: int = Field(256, ge=1)
    """Size of a shard, and of what a queue without an engine transfers."""
    hidden_size: int = Field(1024, ge=8)
    """Width of the hidden states in it, four of which belong to a token."""
