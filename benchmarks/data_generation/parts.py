"""``python -m benchmarks.data_generation``: ratios of rates measured in turns.

Engines, consumers and whole runs are in fresh processes. Texts are pieces of this interpreter's
standard library.
"""

from collections.abc import Callable, Iterator
from typing import Annotated

from cyclopts import Parameter

from benchmarks.data_generation.settings import DataBenchmarkConfig, Part
from benchmarks.ratios import Line, print_lines


def run(*, settings: Annotated[DataBenchmarkConfig | None, Parameter(name="*")] = None) -> None:
    """Measures engines, stores and queues of data generation."""
    # Here: they import torch, for which --help and a wrong flag need not wait.
    from benchmarks.data_generation.disk import measure_disk
    from benchmarks.data_generation.engine import measure_engine
    from benchmarks.data_generation.memory import measure_memory
    from benchmarks.data_generation.queues import measure_queues

    settings = settings or DataBenchmarkConfig()
    measures: dict[Part, Callable[[DataBenchmarkConfig], Iterator[Line]]] = {
        "engine": measure_engine,
        "disk": measure_disk,
        "queues": measure_queues,
        "memory": measure_memory,
    }
    print_lines(
        "data generation", (line for part in settings.parts for line in measures[part](settings))
    )
