"""Stops a run on a signal, its state saved."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from speculators_core.console import console
from speculators_core.training.ranks import rank, world_size
from speculators_core.training.states.run_folder import newest_whole_state

STDERR = 2
STOPPING = b"stopping after this step; press Ctrl-C again to stop at once, without saving it\n"


class Interrupted(Exception):
    """An evaluation, or a wait for a row, was interrupted so that the run can stop."""


class StopOnSignal(TrainerCallback):
    """After SIGTERM or Ctrl-C the current step is finished, its state saved, and the run ends.

    A wait for a row is interrupted, and so is an evaluation of a run of one process, which is made
    up for when the run is resumed. Such a run ends at once, without saving, at a second Ctrl-C.
    torchrun repeats a signal that its processes got from the terminal too, so there a second one
    means nothing.
    """

    def __init__(self) -> None:
        self.is_asked = False
        """Whether this process got a signal; the others may stop a step later."""
        self.has_stopped = False
        self._may_interrupt = False

    def _receive(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and world_size() == 1:
            if self.is_asked:
                raise KeyboardInterrupt
            # Python's own streams must not be written to in the midst of another write.
            os.write(STDERR, STOPPING)
        self.is_asked = True
        if self._may_interrupt:
            raise Interrupted

    def check(self) -> None:
        """Raises Interrupted after a signal."""
        if self.is_asked:
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal interrupts the work inside.

        Raises:
            Interrupted: there was a signal.
        """
        if torch.distributed.is_initialized():  # the other ranks would wait for this one
            yield
            return
        self._may_interrupt = True
        try:
            yield
        except Interrupted:
            self.has_stopped = True
            raise
        finally:
            self._may_interrupt = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receives signals, in the main thread, which alone can."""
        with handling((signal.SIGTERM, signal.SIGINT), self._receive):
            yield

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if _any_rank(self.is_asked, args.device) and state.global_step < state.max_steps:
            self.has_stopped = True
            control.should_evaluate = False
            control.should_save = control.should_log = control.should_training_stop = True


@contextmanager
def handling(
    numbers: Sequence[int], handler: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Sends these signals to ``handler`` inside; has no effect outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


def _any_rank(flag: bool, device: torch.device) -> bool:
    if not torch.distributed.is_initialized():
        return flag
    count = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(count)
    return bool(count > 0)


@contextmanager
def reporting_interrupt(run: Path) -> Iterator[None]:
    """Prints what the folder of a run keeps where Ctrl-C or SIGTERM interrupts the work inside.

    Raises:
        KeyboardInterrupt: for either signal.
    """
    try:
        with handling((signal.SIGTERM,), signal.default_int_handler):
            yield
    except KeyboardInterrupt:
        if rank() == 0:
            kept = describe_kept(newest_whole_state(run))
            console.print(f"interrupted; {kept}", markup=False, soft_wrap=True)
        raise


def describe_kept(state: Path | None) -> str:
    """What a run that was stopped keeps, and how to resume it."""
    if state is None:
        return "no state was saved. Run the same command to start again."
    return f"{state} is saved. Run the same command to resume."
