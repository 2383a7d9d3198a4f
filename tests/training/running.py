"""What processes of the tests of whole runs do."""

import os
import signal
import sys
from collections.abc import Callable

import torch

from speculators_core.training import job  # noqa: F401  # imported ahead
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.train import train
from speculators_core.training.watch import LogFile


def train_here(plan: str) -> None:
    torch.set_num_threads(1)
    train(TrainingPlan.model_validate_json(plan))


def train_and_die(plan: str, lines: int, number: int) -> None:
    signal_after(lines, number)
    train_here(plan)


def signal_after(lines: int, number: int) -> None:
    """This process sends itself a signal when a run has logged so many lines."""
    after_lines(lines, lambda: os.kill(os.getpid(), number))


def after_lines(lines: int, act: Callable[[], None]) -> None:
    """Acts when a run has logged so many lines."""
    on_log = LogFile.on_log
    written = 0

    def counted(*args, **kwargs):
        nonlocal written
        on_log(*args, **kwargs)
        written += 1
        if written == lines:
            act()

    LogFile.on_log = counted


KILL, TERM = signal.SIGKILL, signal.SIGTERM


def train_and_stop_evaluating(plan: str, number: int) -> None:
    """Is asked to stop in the midst of an evaluation."""
    measure, calls = job.measure_acceptance, 0

    def asked(*args):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*args)

    job.measure_acceptance = asked
    train_here(plan)


def train_as_rank(plan: str, rank: int, world_size: int, port: int, stopped: bool) -> None:
    """One of the processes that torchrun would start; the last is ``stopped`` after two lines."""
    if stopped and rank == world_size - 1:
        signal_after(2, TERM)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    train_here(plan)


def train_with_workers_and_stop(plan: str, code: int) -> None:
    """Sends Ctrl-C to itself and its children after three lines; ends with ``code`` if it saved."""
    os.setsid()
    after_lines(3, lambda: os.killpg(0, signal.SIGINT))
    torch.set_num_threads(1)
    report = train(TrainingPlan.model_validate_json(plan))
    sys.exit(code if report.saved_state is not None else 0)
