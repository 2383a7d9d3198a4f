"""Commands are light: their help comes before anything heavy is imported."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from speculators_core.cli import app
from speculators_core.registry import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "vllm", "datasets", "pyarrow", "huggingface_hub")


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_has_a_line_of_help_and_none_is_imported_for_it():
    code = (
        "import sys, time\n"
        "from speculators_core.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(time.process_time())\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
        "print([name for name in sys.modules if '.commands.' in name])\n"
    )
    *shown, seconds, heavy, commands = in_a_process(code).splitlines()
    assert heavy == commands == "[]"
    assert float(seconds) < 1.0
    table = app()
    for name in COMMANDS.names():
        (line,) = [line for line in shown if line.startswith(f"│ {name} ")]
        words = table[name].help.partition("\n")[0].split()
        assert line.split()[2:5] == words[:3], name


@pytest.mark.parametrize("name", COMMANDS.names())
def test_help_of_a_command_loads_nothing_heavy(name):
    code = (
        "import sys\n"
        "from speculators_core.cli import main\n"
        f"try: main(['{name}', '--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    *shown, heavy = in_a_process(code).splitlines()
    assert heavy == "[]"
    assert shown[0].startswith(f"Usage: speculators {name}")


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("generate-data", "[OPTIONS]"),
        ("inspect", "[OPTIONS] STORE"),
        ("push", "[OPTIONS] FOLDER REPO"),
        ("regenerate", "--output PATH [OPTIONS] PATH"),
        ("train", "[OPTIONS]"),
        ("acceptance", "[OPTIONS]"),
        ("certify", "[OPTIONS] SPECULATOR"),
        ("check", "[OPTIONS] SPECULATOR"),
    ],
)
def test_only_what_a_command_is_about_is_positional(capsys, name, usage):
    with pytest.raises(SystemExit):
        app()([name, "--help"])
    assert capsys.readouterr().out.splitlines()[0] == f"Usage: speculators {name} {usage}"


FOREIGN = {
    "--chat-template",
    "--disable-log-stats",
    "--help",
    "--kv-cache-dtype",
    "--kv-transfer-config",
    "--nproc-per-node",
    "--runner",
    "--structured-outputs-config",
}
"""Flags of vLLM's server, of torchrun, and of every command."""


def test_errors_name_flags_that_exist():
    commands = app()
    known = {
        flag
        for name in COMMANDS.names()
        for argument in commands[name].assemble_argument_collection()
        for flag in argument.names
    }
    for package in ("speculators_core", "speculators_vllm", "benchmarks/acceptance"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for raised in ast.walk(ast.parse(file.read_text())):
                if isinstance(raised, ast.Raise):
                    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", ast.unparse(raised)))
                    assert named <= known | FOREIGN, file
