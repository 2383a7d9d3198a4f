"""The data generation benchmark at its smallest."""

import subprocess
import sys

import pytest

from benchmarks.data_generation import queues
from benchmarks.data_generation.parts import run
from benchmarks.data_generation.settings import DataBenchmarkConfig
from speculators_core.console import console

SMALLEST = {"texts": 8, "length": 8, "runs": 1, "megabytes": 1, "hidden_size": 8}


def test_parts_are_measured_and_printed():
    with console.capture() as shown:
        run(settings=DataBenchmarkConfig(parts=("disk", "memory"), **SMALLEST))
    for what in ("DiskStore writes", "checksums compared", "any further time", "peak memory"):
        assert shown.get().count(what) == 2  # a line when it is measured, and the table's row


@pytest.mark.parametrize("kind", ["mp_queue", "zmq"])
def test_queues_are_measured_with_an_engine_and_without(kind):
    settings = DataBenchmarkConfig(**SMALLEST)
    for rates in (queues._rates_through, queues._rates_without_engine):
        assert min(rates(settings, kind)) > 0


def test_wrong_flags_are_one_line():
    command = [sys.executable, "-m", "benchmarks.data_generation", "--texts", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "greater than or equal to 8" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
