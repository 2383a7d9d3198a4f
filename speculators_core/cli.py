"""The command line: one function a command, each found through the group `speculators.commands`."""

import sys
import traceback
from collections.abc import Callable
from typing import Any

import cyclopts
from pydantic import ValidationError
from rich.console import Console

from speculators_core import console
from speculators_core.errors import SpeculatorError, first_fault
from speculators_core.registry import COMMANDS

ERROR_EXIT = 2
FAULT_EXIT = 3
"""A fault of ours, with its traceback."""


def app() -> cyclopts.App:
    """Every installed command; a command's module is imported when it is called."""
    commands = cyclopts.App(
        name="speculators",
        help="Train, check and serve speculators for speculative decoding.",
        version_flags=["--version"],
        error_console=_stderr(),
        error_formatter=_one_line,
    )
    for name in COMMANDS.names():
        commands.command(COMMANDS.path(name), name=name)
    return commands


def _stderr() -> Console:
    return Console(stderr=True, soft_wrap=True)


def _one_line(error: Exception) -> str:
    """A wrong flag or value; pydantic's complaint where it judged."""
    cause = error.__cause__
    text = first_fault(cause) if isinstance(cause, ValidationError) else str(error)
    if isinstance(error, cyclopts.UnusedCliTokensError):
        tokens = " ".join(map(repr, error.unused_tokens or ()))
        text = f"unexpected {tokens}; a switch takes no value: --name is on, --no-name is off"
    return f"error: {' '.join(text.split())}"


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; what a user can act on is one line on stderr and exit code 2."""
    _run(app(), arguments)


def run_function(function: Callable[..., Any]) -> None:
    """Runs a function that is no installed command, with the same manners."""
    single = cyclopts.App(help=function.__doc__, error_console=_stderr(), error_formatter=_one_line)
    single.default(function)
    _run(single, None)


def _run(commands: cyclopts.App, arguments: list[str] | None) -> None:
    console.set_up()
    try:
        commands(sys.argv[1:] if arguments is None else arguments)
    except SpeculatorError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(ERROR_EXIT)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # Python's own code for it is 1, which is a verdict of some commands
        traceback.print_exc()
        sys.exit(FAULT_EXIT)
