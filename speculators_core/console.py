"""Log lines and progress on the terminal."""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0

PIPE_WIDTH = 120

console = Console()
if not console.is_terminal:
    console = Console(width=PIPE_WIDTH)


def set_up() -> None:
    """Sends log lines to the terminal. Called once, by the command line."""
    handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
    for package in ("speculators_core", "speculators_vllm", "benchmarks"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM stops what runs in the same way as Ctrl-C; for the main thread.

    Also where Ctrl-C is ignored, as in what a shell runs in the background.
    """

    def stop(*_: object) -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def result_alone_on_stdout() -> Iterator[None]:
    """Redirects stdout to stderr, that of child processes too."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


class Advance(Protocol):
    def __call__(self, note: str = "") -> None: ...


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Yields a function to call after each of ``total`` steps, with a note to display."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda note="": bar.update(task, advance=1, description=f"{what} {note}")
        return

    done, last_line = 0, time.monotonic()

    def advance(note: str = "") -> None:
        nonlocal done, last_line
        done += 1
        if time.monotonic() - last_line >= LINE_EVERY_S:
            console.print(f"{what}: {done} of {total} {note}")
            last_line = time.monotonic()

    yield advance
