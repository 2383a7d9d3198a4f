"""What a starting engine prints, by a process that prints in every way that vLLM does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PRINTS = """
import logging, os, subprocess, sys
from speculators_core import console
from speculators_vllm import engine_log
console.set_up()
if sys.argv[1] == "quiet":
    engine_log.start_log()
    engine_log.start_log()
later = None
try:
    with engine_log.logged():
        print("python")
        print("python's stderr", file=sys.stderr)
        os.write(1, b"native\\n")
        os.write(2, b"native stderr\\n")
        subprocess.run("echo child; echo child stderr >&2", shell=True, check=True)
        later = subprocess.Popen("read line; echo late child", shell=True, stdin=subprocess.PIPE)
        console.console.print("our line")
        logging.getLogger("speculators_vllm.plugin").warning("our warning")
        raise ValueError("no memory")
except ValueError as error:
    print(f"{error}.{engine_log.log_sentence()}", file=sys.stderr)
later.communicate(b"go on\\n")
os.write(1, b"native at the end\\n")
print("the end")
"""
NOISE = ("python", "python's stderr", "native", "native stderr", "child", "child stderr")


def prints(how):
    return subprocess.run(
        [sys.executable, "-c", PRINTS, how], capture_output=True, text=True, check=True
    )


@pytest.fixture(scope="module")
def quiet():
    return prints("quiet")


@pytest.fixture(scope="module")
def log(quiet):
    """The log, which is named in one line."""
    (path,) = re.findall(r"vLLM's output while it starts goes to (\S+\.log)", quiet.stdout)
    yield Path(path)
    Path(path).unlink()


def test_an_engines_output_goes_to_the_log(quiet, log):
    lines = log.read_text().splitlines()
    assert sorted(lines) == sorted([*NOISE, "late child"])
    for line in NOISE:
        assert line not in quiet.stdout.splitlines() + quiet.stderr.splitlines()


def test_our_lines_and_later_output_go_to_the_terminal(quiet):
    for line in ("our line", "our warning", "native at the end", "the end"):
        assert line in quiet.stdout


def test_an_error_names_the_log(quiet, log):
    assert quiet.stderr == f"no memory. vLLM's log: {log}.\n"


def test_without_a_log_everything_goes_to_the_terminal():
    done = prints("verbose")
    shown = done.stdout.splitlines() + done.stderr.splitlines()
    assert {*NOISE, "late child", "our line", "no memory."} <= set(shown)
