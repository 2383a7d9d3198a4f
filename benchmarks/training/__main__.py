"""``python -m benchmarks.training``: how fast drafts train, beside others."""

from benchmarks.training.parts import run
from speculators_core.cli import run_function

if __name__ == "__main__":
    run_function(run)
