"""Log file for the output of a starting engine."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speculators_core.console import console

logger = logging.getLogger(__name__)

_log: Path | None = None
"""The log of this process; None if vLLM prints to the terminal."""


def start_log() -> None:
    """Sends what vLLM prints while it starts to a file from now on, and names the file."""
    global _log
    if _log is not None:
        return
    descriptor, name = tempfile.mkstemp(prefix="speculators-vllm-", suffix=".log")
    os.close(descriptor)
    _log = Path(name)
    if console.file is sys.__stdout__:  # our lines do not pass through stdout, which is redirected
        console.file = os.fdopen(os.dup(1), "w", encoding=sys.__stdout__.encoding)
    logger.info("vLLM's output while it starts goes to %s", _log)


def log_sentence() -> str:
    """Names the log at the end of an error; empty without a log."""
    return "" if _log is None else f" vLLM's log: {_log}."


@contextmanager
def logged() -> Iterator[None]:
    """Sends stdout and stderr to the log meanwhile, native libraries and child processes included.

    Lines of our console still go to the terminal. A child process that lives longer keeps writing
    to the log.
    """
    if _log is None:
        yield
        return
    _flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    with _log.open("ab") as file:
        for number, _ in saved:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        _flush()
        for number, terminal in saved:
            os.dup2(terminal, number)
            os.close(terminal)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
