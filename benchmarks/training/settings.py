"""Options of the training benchmark."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from benchmarks.training import PEERS
from speculators_core.flags import Several
from speculators_core.settings import Settings

Algorithm = Literal["eagle3", "peagle", "dflash", "mtp"]
Part = Literal["steps", "peers", "overhead", "online"]
Trainer = Literal["equal", "ours"]


class StepsBenchmarkConfig(Settings):
    """Part `steps`: a row of random tokens."""

    lengths: Annotated[
        tuple[Annotated[int, Field(ge=16)], ...],
        Several,
        Field(min_length=1),
    ] = (1024, 2048, 4096, 8192)
    """Lengths of the packed row, in tokens."""
    hidden_size: int = Field(128, ge=64, multiple_of=64)
    """Width of verifier and draft; heads are 32 wide, and two share their keys."""
    vocab_size: int = Field(2048, ge=16)
    """Vocabulary of verifier and draft."""
    documents: int = Field(1, ge=1)
    """Documents of equal length in a row."""
    timed: int = Field(5, ge=1)
    """Timed steps, after one that is not; the median counts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the draft's weights and of the hidden states."""
    peer: Path | None = None
    """Folder with the public `speculators` library, whose steps are timed in turns with ours."""
    rounds: int = Field(3, ge=1)
    """Turns of both, with `peer`; the median of each counts."""


class RunsBenchmarkConfig(Settings):
    """Parts `peers`, `overhead` and `online`: whole runs."""

    trainers: Annotated[tuple[Trainer, ...], Several, Field(min_length=1)] = ("equal", "ours")
    """Trainings to compare with the peers: AdamW with their loss, and our defaults."""
    peers: Path = PEERS
    """Folder with a verifier, speculators for it, and acceptance.json."""
    rows: int = Field(700, ge=10)
    """Rows to train on."""
    length: int = Field(1024, ge=32)
    """Tokens of each row."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Several, Field(min_length=1)] = (0,)
    """Seeds of drafts, the first also of the rows; `peers` prints the median of all."""


class TrainingBenchmarkConfig(Settings):
    """Measurements and their drafts."""

    parts: Annotated[tuple[Part, ...], Several, Field(min_length=1)] = (
        "steps",
        "peers",
        "overhead",
        "online",
    )
    """Measurements."""
    algorithms: Annotated[tuple[Algorithm, ...], Several, Field(min_length=1)] = (
        "eagle3",
        "peagle",
        "dflash",
        "mtp",
    )
    """Drafts; `online` trains the first."""
    steps: StepsBenchmarkConfig = Field(default_factory=StepsBenchmarkConfig)
    runs: RunsBenchmarkConfig = Field(default_factory=RunsBenchmarkConfig)
