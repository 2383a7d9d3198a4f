"""No command ends in a traceback over a fault of a file or a flag; its line names file and key.

`make test-mutants` runs all. A command that would start vLLM is run up to there.
"""

import logging
import signal
import subprocess
from pathlib import Path

import pytest

from speculators_core.cli import app, main
from speculators_core.training import finish
from speculators_vllm import offline
from tests.data_generation.answers.chat_server import chat_server
from tests.mutants.material import COMMANDS, Place, command_line, write_material
from tests.mutants.mutations import Mutation, mutation

NUM_MUTANTS = 408
SAMPLE = range(0, NUM_MUTANTS, 23)
"""Run in `make test`: a mutant of nearly each kind of file."""
LONGEST_S = 120
VERDICTS = ("check", "verify", "generate-data", "generate chats", "regenerate")
"""Commands whose exit code 1 says that what they read is not sound, and why."""


class EngineStarted(BaseException):
    """What comes before vLLM found no fault."""


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[Path, bytes]:
    """Every file with its sound content; the first key is the folder's own, without content."""
    folder = write_material(tmp_path_factory.mktemp("mutants") / "given")
    return {folder: b""} | {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def server():
    with chat_server() as server:
        yield server.url


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No engine, no other process, no proxy, and no call of any length."""

    def start(arguments):
        raise EngineStarted

    def is_late(*_):
        raise TimeoutError(f"still running after {LONGEST_S} s")

    monkeypatch.setattr(offline, "_start", start)
    monkeypatch.setattr(
        finish, "_command", lambda *words: subprocess.CompletedProcess(words, 1, "", "not run")
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # vLLM keeps an earlier test's stderr
    before = signal.signal(signal.SIGALRM, is_late)
    signal.alarm(LONGEST_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def flags_of(command: str) -> list[str]:
    """The flags of a command of the command line."""
    arguments = app()[command].assemble_argument_collection()
    return sorted({name for one in arguments for name in one.names if name.startswith("--")})


def outcome(words: list[str]) -> int | None:
    """The exit code; None where vLLM would start."""
    try:
        main(words)
    except SystemExit as end:
        return 0 if end.code is None else end.code
    except EngineStarted:
        return None
    return 0


@pytest.fixture
def run(material, server, tmp_path, capfd):
    """Runs a mutant; gives the exit code and everything that was printed."""
    given = next(iter(material))

    def run(mutant: Mutation) -> tuple[int | None, str]:
        file = given / mutant.file
        if mutant.content is not None:
            file.write_bytes(mutant.content)
        elif mutant.file:
            file.unlink()
        words = command_line(mutant.command, mutant.draft, Place(given, tmp_path, server))
        capfd.readouterr()
        try:
            code = outcome([*words, *mutant.flags])
        finally:
            if mutant.file:
                file.write_bytes(material[file])
        return code, "".join(capfd.readouterr())

    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.mutants
def test_the_material_is_sound(run, command):
    code, printed = run(Mutation(command, "eagle3", "", "", "nothing", None))
    assert code in (0, None), printed


@pytest.mark.parametrize(
    "number",
    [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.mutants) for n in range(NUM_MUTANTS)],
)
def test_a_fault_is_one_line(run, material, number):
    mutant = mutation(number, next(iter(material)), flags_of)
    code, printed = run(mutant)
    assert "Traceback" not in printed, f"{mutant}\n{printed}"
    assert code in (0, 2, None) or (code == 1 and mutant.command in VERDICTS), f"{mutant}\n{code}"
    if code == 2:
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and printed.rstrip().endswith(lines[0]), f"{mutant}\n{printed}"
        assert mutant.is_named_in(lines[0]), f"{mutant}\n{lines[0]}"
