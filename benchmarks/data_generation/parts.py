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
    from benchmarks.data_generation import disk, engine, memory, queues

    settings = settings or DataBenchmarkConfig()
    measures: dict[Part, Callable[[DataBenchmarkConfig], Iterator[Line]]] = {
        "engine": engine.measure_engine,
        "disk": disk.measure_disk,
        "queues": queues.measure_queues,
        "memory": memory.measure_memory,
    }
    print_lines(
        "data generation", (line for part in settings.parts for line in measures[part](settings))
    )
