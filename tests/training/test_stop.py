import os
import signal

import pytest

from speculators_core.commands.train import STOPPED_EXIT
from speculators_core.training.states.state_folder import MANIFEST
from speculators_core.training.stop import (
    Interrupted,
    StopOnSignal,
    describe_kept,
    reporting_interrupt,
)
from speculators_core.training.train import TrainReport, print_report
from tests.data_generation.processes import processes
from tests.training.making import plan_of
from tests.training.running import train_with_workers_and_stop


def send(number):
    os.kill(os.getpid(), number)


def test_first_ctrl_c_is_heard_and_second_ends_at_once(capfd):
    stop = StopOnSignal()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        stop.check()
        send(signal.SIGINT)
        with pytest.raises(Interrupted):
            stop.check()
        assert "stopping after this step" in capfd.readouterr().err
        send(signal.SIGINT)


def test_signals_that_torchrun_repeats_mean_one(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop = StopOnSignal()
    with stop.listening():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            send(number)
    assert stop.is_asked and not capfd.readouterr().err


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopOnSignal().listening(), reporting_interrupt(None):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def make_states(run, *steps):
    for step in steps:
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / MANIFEST).write_text("{}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_says_what_is_kept(tmp_path, capsys, number):
    with pytest.raises(KeyboardInterrupt), reporting_interrupt(tmp_path):
        send(number)
    assert "no state was saved. Run the same command to start again." in capsys.readouterr().out
    make_states(tmp_path, 8, 12)
    (tmp_path / "checkpoint-16").mkdir()  # half of one
    with pytest.raises(KeyboardInterrupt), reporting_interrupt(tmp_path):
        send(number)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"interrupted; {describe_kept(tmp_path / 'checkpoint-12')}"


def test_last_line_of_a_stopped_run_says_what_is_kept(tmp_path, capsys):
    state = tmp_path / "checkpoint-3"
    print_report(TrainReport(speculator=None, saved_state=state, steps=3))
    line = f"stopped after step 3; {state} is saved. Run the same command to resume."
    assert capsys.readouterr().out.splitlines() == [line]


@pytest.mark.slow
def test_ctrl_c_at_the_whole_process_group_saves_first(given, tmp_path):
    """Processes that read rows ahead get it too."""
    plan = plan_of(
        given,
        tmp_path / "run",
        data={"num_workers": 1},
        evaluation={"decode": False},
        run={"max_steps": 1000},
    )
    process = processes.Process(
        target=train_with_workers_and_stop, args=(plan.model_dump_json(), STOPPED_EXIT)
    )
    process.start()
    process.join(timeout=180)
    assert process.exitcode == STOPPED_EXIT
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert (saved / MANIFEST).exists()
