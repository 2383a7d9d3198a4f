"""The exceptions that a user can act on."""

from typing import Literal

from pydantic import ValidationError

Cause = Literal[
    "damaged checkpoint",
    "invalid config",
    "wrong verifier",
    "wrong tokenizer",
    "chat template",
    "wrong layer ids",
    "missing norm",
    "d2t offset",
    "rope",
    "position shift",
    "hidden-state timing",
    "context longer than trained",
    "dead draft",
    "unsupported by vLLM",
    "served otherwise",
]
"""Why a speculator does not serve as it was trained, in the words of `speculators check`."""


class SpeculatorError(ValueError):
    """States in one or two sentences what was found, what was expected and what to do.

    The command line prints it as one line and exits with code 2.
    """

    def __init__(self, message: str, *, cause: Cause | None = None):
        super().__init__(message)
        self.cause: Cause | None = cause
        """What is wrong with a speculator; None where the error is about something else."""

    def within(self, where: object, cause: Cause | None = None) -> "SpeculatorError":
        """The same error with the place before its message; ``cause`` is for one without any."""
        return type(self)(f"{where}: {self}", cause=self.cause or cause)


class UnsupportedError(SpeculatorError, NotImplementedError):
    """It exists, and nothing here does it."""


class WrongTypeError(SpeculatorError, TypeError):
    """An object of another class than the one that is needed."""


class MissingAttributeError(SpeculatorError, AttributeError):
    """An object lacks what its users read."""


class UnreadFormatError(UnsupportedError):
    """A speculator that may be sound, in a form that this package does not read and vLLM may.

    It has no cause: nothing is known to be wrong.
    """

    def within(self, where: object, cause: Cause | None = None) -> "SpeculatorError":
        return UnreadFormatError(f"{where}: {self}")


def first_line(error: BaseException) -> str:
    """First line of another library's message; the error's type where it has no message."""
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
