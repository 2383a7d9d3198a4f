"""Ctrl-C: one line says what is kept, and the run can be resumed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data_generation.answers.chat_server import Run, chat_server, echo

COMMAND = str(Path(sys.executable).with_name("speculators"))


@pytest.mark.parametrize(
    ("number", "as_job"),
    [(signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGTERM, ("env", "--ignore-signal=INT"))],
    ids=["Ctrl-C", "kill", "kill in the background"],
)
def test_a_signal_says_what_is_kept_and_how_to_resume(tmp_path, number, as_job):
    def reply(body):
        time.sleep(0.02)
        return echo(body)

    run = Run(tmp_path)
    rows = [{"messages": [{"role": "user", "content": f"q{row}"}]} for row in range(500)]
    with chat_server(reply) as server:
        flags = ["--output", run.output, "--base-url", server.url, "--concurrency", 1]
        command = [*as_job, COMMAND, "regenerate", *map(str, (run.write(rows), *flags))]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while not run.output.exists() or run.output.read_bytes().count(b"\n") < 3:
                time.sleep(0.01)
                assert process.poll() is None
            process.send_signal(number)
            _, told = process.communicate(timeout=60)
        assert process.returncode == 130
        *_, line = told.strip().splitlines()
        assert line == (
            f"stopped: {len(run.lines())} conversations are done, in {run.output}. Run the same "
            "command with --resume to continue."
        )
