"""``python -m benchmarks.training``: training steps, and whole runs compared."""

from typing import Annotated

from cyclopts import Parameter

from benchmarks.training.settings import TrainingBenchmarkConfig


def run(*, settings: Annotated[TrainingBenchmarkConfig | None, Parameter(name="*")] = None) -> None:
    """Measures how fast drafts train, how well, and in how much memory."""
    # Here: they import torch, for which --help and a wrong flag need not wait.
    from benchmarks.training import runs, steps

    settings = settings or TrainingBenchmarkConfig()
    if "steps" in settings.parts:
        steps.measure_steps(settings.steps, settings.algorithms)
    whole = [part for part in settings.parts if part != "steps"]
    if whole:
        runs.measure_runs(whole, settings.runs, settings.algorithms)
