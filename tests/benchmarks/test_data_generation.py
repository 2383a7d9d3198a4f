"""The data generation benchmark at its smallest."""

import subprocess
import sys

import pytest

from benchmarks.data_generation import memory, queues
from benchmarks.data_generation.parts import run
from benchmarks.data_generation.settings import DataBenchmarkConfig
from speculators_core.console import console

SMALLEST = {"texts": 8, "length": 8, "runs": 1, "megabytes": 1, "hidden_size": 8}


def test_a_shard_is_measured_and_printed():
    with console.capture() as shown:
        run(settings=DataBenchmarkConfig(parts=("disk",), **SMALLEST))
    for what in ("DiskStore writes", "checksums compared", "any further time"):
        assert shown.get().count(what) == 2  # a line when it is measured, and the table's row


def test_memory_of_a_run_is_measured():
    assert memory._peak_mb(DataBenchmarkConfig(**SMALLEST), 2) > 0


@pytest.mark.parametrize(
    ("rates", "kind"),
    [(queues._rates_through, "mp_queue"), (queues._rates_without_engine, "zmq")],
)
def test_queues_are_measured_with_an_engine_and_without(rates, kind):
    assert min(rates(DataBenchmarkConfig(**SMALLEST), kind)) > 0


def test_wrong_flags_are_one_line():
    command = [sys.executable, "-m", "benchmarks.data_generation", "--texts", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "greater than or equal to 8" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
