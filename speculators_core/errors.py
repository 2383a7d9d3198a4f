"""The one exception that a user can act on."""

from typing import Literal

from pydantic import ValidationError

Cause = Literal[
    "damaged checkpoint",
    "wrong layer ids",
    "missing norm",
    "d2t offset",
    "rope",
    "position shift",
    "hidden-state timing",
    "chat template",
    "dead draft",
    "served otherwise",
]
"""Why a speculator does not serve as it was trained, in the words of `speculators check`."""


class SpeculatorError(ValueError):
    """Says in one or two sentences what was found, what was expected and what to do.

    The command line prints it as one line and leaves with exit code 2.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says first."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def first_fault(error: ValidationError) -> str:
    """The first complaint of a pydantic validation as ``field: complaint (found value)``."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    found = repr(fault["input"])
    shown = found if len(found) < 80 else f"{found[:77]}..."
    return f"{where}: {message} (found {shown})" if where else message
