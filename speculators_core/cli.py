"""The command line: every command of the group `speculators.commands`."""

import ast
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import cyclopts
from pydantic import ValidationError
from rich.console import Console

from speculators_core import console
from speculators_core.errors import SpeculatorError, first_fault
from speculators_core.registry import COMMANDS, did_you_mean

DISTRIBUTION = "speculators-vllm"
ERROR_EXIT = 2
FAULT_EXIT = 3
"""A bug, with its traceback."""

NEGATIVE = re.compile(r"--no[-_](?P<section>\w[\w.-]*)\.(?P<switch>[\w-]+)")


def app() -> cyclopts.App:
    """Every installed command; a command's module is imported when it is called."""
    commands = _app("Train, check and serve speculators for speculative decoding.", "speculators")
    for name in COMMANDS.names():
        path = COMMANDS.path(name)
        commands.command(path, name=name, help=_docstring(path))
    return commands


def _app(help: str, name: str | None = None) -> cyclopts.App:
    return cyclopts.App(
        name=name,
        help=help,
        version=lambda: version(DISTRIBUTION),
        error_console=Console(stderr=True, soft_wrap=True),
        error_formatter=_one_line,
        config=_read_keys,
        suppress_keyboard_interrupt=False,  # a command says what is kept
    )


def _docstring(path: str) -> str:
    """Of the function at ``module:function``, read without importing its module."""
    module, _, name = path.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # of its package: the command says so when it is called
        return ""
    if spec is None or spec.origin is None:
        return ""
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) or ""
    return ""


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. An error that a user can act on is one line on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    names = list(COMMANDS.names())
    if given and not given[0].startswith("-") and given[0] not in names:
        # Here: to make a suggestion the parser imports every command, and one may be broken.
        hint = did_you_mean(given[0], names)
        sys.stderr.write(
            f'error: Unknown command "{given[0]}".{hint} Available commands: {", ".join(names)}.\n'
        )
        sys.exit(ERROR_EXIT)
    _run(app(), given)


def run_function(function: Callable[..., None]) -> None:
    """Runs a function that is not an installed command in the same way."""
    single = _app(function.__doc__ or "")
    single.default(function)
    _run(single, None)


def _run(commands: cyclopts.App, arguments: list[str] | None) -> None:
    console.set_up()
    given = sys.argv[1:] if arguments is None else arguments
    try:
        commands([_as_parsed(argument) for argument in given])
    except SpeculatorError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(ERROR_EXIT)
    except KeyboardInterrupt as stop:
        if str(stop):  # the command says what is kept
            sys.stderr.write(f"{stop}\n")
        sys.exit(130)
    except Exception:  # Python would exit with 1, which is a verdict of some commands
        traceback.print_exc()
        sys.exit(FAULT_EXIT)


# ---- flags ----


def _as_parsed(argument: str) -> str:
    """The spelling of a flag that the parser knows: `--no-run.check` is `--run.no-check`."""
    found = NEGATIVE.fullmatch(argument)
    return argument if found is None else f"--{found['section']}.no-{found['switch']}"


def _read_keys(
    app: cyclopts.App, commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection
) -> None:
    """Keys and values of flags into a mapping, such as `--model.recipe.num-layers 2`.

    Dashes are underscores in a key too. A value is JSON where it can be: 2, true or [1, 2].
    """
    for argument in arguments:
        argument.tokens = [_read_key(token) if token.keys else token for token in argument.tokens]


def _read_key(token: cyclopts.Token) -> cyclopts.Token:
    keys = tuple(key.replace("-", "_") for key in token.keys)
    try:
        return token.evolve(keys=keys, implicit_value=json.loads(token.value))
    except ValueError:  # a word
        return token.evolve(keys=keys)


# ---- errors ----


def _one_line(error: cyclopts.CycloptsError) -> str:
    """A wrong flag or value; pydantic's complaint where it judged."""
    text = str(error)
    if isinstance(error.__cause__, ValidationError):
        text = _complaint(error.__cause__, error.argument)
    elif isinstance(error, cyclopts.UnusedCliTokensError):
        text = _unused(error)
    return f"error: {' '.join(text.split())}"


def _complaint(error: ValidationError, argument: cyclopts.Argument | None) -> str:
    """The first complaint, of the flag whose value it is about, where it is about one."""
    place = tuple(str(part) for part in error.errors(include_url=False)[0]["loc"])
    text = first_fault(error)
    for flag in argument.children_recursive if argument else ():
        if not flag.children and flag.keys == place[: len(flag.keys)]:
            _, *inside = place[len(flag.keys) :] or ("",)  # the first is the number of a value
            where = ".".join([flag.name, *inside])
            return f"{where}{text.removeprefix('.'.join(place))}"
    return text


def _unused(error: cyclopts.UnusedCliTokensError) -> str:
    """What to do with words that no flag takes."""
    unused, given = error.unused_tokens or [], error.root_input_tokens or []
    text = f"unexpected {' '.join(map(repr, unused))}"
    before = given[given.index(unused[0]) - 1] if unused[0] in given[1:] else ""
    if not before.startswith("--") or error.app is None:
        return f"{text}; see --help."
    switch, _, _ = error.app.assemble_argument_collection().match(before)
    off = f", {' or '.join(switch.negatives)} turns it off" if switch.negatives else ""
    return f"{text} after {before}, which takes no value: {switch.name} turns it on{off}."
