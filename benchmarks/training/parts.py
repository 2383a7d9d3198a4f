"""How drafts train: single steps, and whole runs beside other trainers, bare steps and a store.

``python -m benchmarks.training``.
"""

from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from benchmarks.training.runs import RunsBenchmarkConfig, measure_runs
from benchmarks.training.steps import StepsBenchmarkConfig, measure_steps
from speculators_core.flags import Several
from speculators_core.settings import Settings

Algorithm = Literal["eagle3", "peagle", "dflash", "mtp"]
Part = Literal["steps", "peers", "overhead", "online"]


class TrainingBenchmarkConfig(Settings):
    """What is measured."""

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


def run(*, settings: Annotated[TrainingBenchmarkConfig | None, Parameter(name="*")] = None) -> None:
    """Measures training."""
    settings = settings or TrainingBenchmarkConfig()
    if "steps" in settings.parts:
        measure_steps(settings.steps, settings.algorithms)
    whole = [part for part in settings.parts if part != "steps"]
    if whole:
        measure_runs(whole, settings.runs, settings.algorithms)
