"""``python -m benchmarks.data_generation``: engines, stores and queues."""

from benchmarks.data_generation.parts import run
from speculators_core.cli import run_function

if __name__ == "__main__":
    run_function(run)
