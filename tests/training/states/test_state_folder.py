"""Whatever happens to a run's folder, a state in it is whole or absent, and others' files stay."""

import itertools
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speculators_core.errors import SpeculatorError
from speculators_core.training.states import state_folder
from speculators_core.training.states.state_folder import (
    FILES,
    MANIFEST,
    UNFINISHED,
    WEIGHTS,
    check_state,
    newest_state,
    read_manifest,
    rotate_states,
    tidy,
    write_whole,
)
from tests.data_generation.processes import processes

CALLS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
"""What changes a folder, or orders the changes."""
NOTE = "notes.txt"


def contents(value: float):
    made = {
        name: {"tensor": torch.full((50,), float(value))}
        if name.endswith(".safetensors")
        else json.dumps({"value": value})
        for name in FILES
    }
    assert len(made) == 6
    return made


def write(run, step, value=None):
    folder = run / f"checkpoint-{step}"
    write_whole(folder, contents(step if value is None else value))
    return folder


def value_in(folder):
    check_state(folder)
    return load_file(folder / WEIGHTS)["tensor"][0].item()


def states_in(run):
    return sorted(path.name for path in run.iterdir() if (path / MANIFEST).exists())


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_what_is_written_is_whole_and_newest(run):
    assert newest_state(run) is None
    for step in (5, 10, 100):
        assert newest_state(write(run, step)) is None
        assert value_in(newest_state(run)) == step
    assert {path.name for path in (run / "checkpoint-5").iterdir()} == {*FILES, MANIFEST}
    assert not list(run.glob(".*"))


def test_others_may_read_all_files(run):
    modes = {path.stat().st_mode & 0o777 for path in write(run, 1).iterdir()}
    assert len(modes) == 1


def test_a_state_has_its_name_when_all_of_it_is_on_disk(run, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(file):
        events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def note_replace(source, target):
        if Path(target).name == "checkpoint-1":
            events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    run.mkdir()
    write(run, 1)
    part = ".checkpoint-1.part"
    assert set(events[:6]) == set(FILES)
    assert events[6].endswith(".part")  # the manifest, before it has its name
    assert events[-3:] == [part, "renamed", "run"]


# ---- damage ----


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_flipped_byte_is_found(run, name, caplog):
    write(run, 1)
    file = write(run, 2) / name
    good = file.read_bytes()
    for place in sorted({*range(0, len(good), 41), len(good) - 1}):
        bad = bytearray(good)
        bad[place] ^= 0b100
        file.write_bytes(bytes(bad))
        with pytest.raises(SpeculatorError, match=re.escape(str(file))):
            check_state(file.parent)
    assert newest_state(run).name == "checkpoint-1"
    (line,) = caplog.messages
    assert line.startswith("skipped checkpoint-2: ") and name in line
    file.write_bytes(good)
    assert newest_state(run).name == "checkpoint-2"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "grown", "missing"])
def test_a_file_of_another_length_is_found(run, name, how, caplog):
    write(run, 1)
    file = write(run, 2) / name
    good = file.read_bytes()
    file.unlink()
    if how != "missing":
        file.write_bytes(good[:-1] if how == "truncated" else good + b"\0")
    what = "No such file" if how == "missing" else rf"it has \d+ bytes, expected {len(good)}"
    with pytest.raises(SpeculatorError, match=f"{re.escape(str(file))} is damaged: {what}"):
        check_state(file.parent)
    assert newest_state(run).name == "checkpoint-1"
    assert len(caplog.messages) == 1


def test_half_of_a_state_is_passed_over_in_silence(run, caplog):
    write(run, 1)
    (write(run, 2) / MANIFEST).rename(run / "checkpoint-2" / UNFINISHED)
    write(run, 3).rename(run / ".checkpoint-3.part")
    (run / "checkpoint-4").mkdir()
    (run / "checkpoint-5").write_text("a file")
    (run / "checkpoint-6").symlink_to(run / "checkpoint-1")
    assert newest_state(run).name == "checkpoint-1"
    assert not caplog.messages


def test_a_state_is_of_the_step_in_its_name(run):
    folder = write(run, 1)
    check_state(folder.rename(run / "the best one"))
    (run / "the best one").rename(run / "checkpoint-2")
    with pytest.raises(SpeculatorError, match="it states step 1, expected 2"):
        check_state(run / "checkpoint-2")


def test_a_manifest_that_is_none_is_said_in_one_line(run):
    with pytest.raises(
        SpeculatorError, match="holds no manifest.json; expected a complete saved state"
    ):
        read_manifest(run)
    folder = write(run, 1)
    text = json.loads((folder / MANIFEST).read_text())
    del text["files"][WEIGHTS]
    (folder / MANIFEST).write_text(json.dumps(text))
    with pytest.raises(SpeculatorError, match="is damaged: files must be weights.safetensors"):
        read_manifest(folder)


# ---- replacing and removing ----


def test_a_state_of_the_same_step_is_replaced(run):
    write(run, 1, value=7)
    assert value_in(write(run, 1, value=8)) == 8
    assert states_in(run) == ["checkpoint-1"]


def test_a_damaged_state_is_replaced_by_one_of_its_step(run):
    for name in (WEIGHTS, MANIFEST):
        (write(run, 1) / name).write_text('{"format": "speculators-state-1"')
        assert value_in(write(run, 1, value=8)) == 8


def test_the_newest_state_is_the_one_written_last(run):
    """A run that goes on before a damaged state comes to lower steps than that one's."""
    write(run, 10)
    file = write(run, 30) / WEIGHTS
    good = file.read_bytes()
    file.write_bytes(bytes(len(good)))
    write(run, 20)
    file.write_bytes(good)
    assert newest_state(run).name == "checkpoint-20"
    rotate_states(run, keep=1)
    assert states_in(run) == ["checkpoint-20"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [50]),
        (2, None, [40, 50]),
        (2, 20, [20, 40, 50]),
        (2, 50, [40, 50]),
        (1, 40, [40, 50]),
        (9, 10, [10, 20, 30, 40, 50]),
    ],
)
def test_the_last_ones_and_the_best_one_are_kept(run, keep, best, left):
    for step in (10, 20, 30, 40, 50):
        write(run, step)
    rotate_states(run, keep, best)
    assert states_in(run) == [f"checkpoint-{step}" for step in left]
    assert [path.name for path in sorted(run.iterdir())] == states_in(run)


def test_a_state_that_lacks_a_part_does_not_count(run):
    for step in (1, 2, 3, 4):
        write(run, step)
    (run / "checkpoint-4" / WEIGHTS).unlink()
    (run / "checkpoint-3" / WEIGHTS).write_bytes(b"short")
    rotate_states(run, keep=1)
    assert newest_state(run).name == "checkpoint-2"
    assert not (run / "checkpoint-1").exists()


def test_what_is_not_ours_stays(run):
    for step in (1, 2, 3):
        write(run, step)
    note = run / "checkpoint-1" / NOTE
    note.write_text("mine")
    theirs = run / "checkpoint-0"
    theirs.mkdir()
    for name in (WEIGHTS, MANIFEST):
        (theirs / name).write_text("{}")
    (run / "checkpoint-7").mkdir()
    (run / "checkpoint-7" / "trainer_state.json").write_text("theirs")
    (run / "checkpoint-2").rename(run / "elsewhere")
    (run / "checkpoint-2").symlink_to(run / "elsewhere")
    rotate_states(run, keep=1)
    assert note.read_text() == "mine"
    assert [path.name for path in note.parent.iterdir()] == [NOTE]
    assert {path.name for path in theirs.iterdir()} == {WEIGHTS, MANIFEST}
    assert (run / "checkpoint-7" / "trainer_state.json").read_text() == "theirs"
    check_state(run / "elsewhere")


def test_a_state_moves_in_beside_a_file_of_others(run):
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "checkpoint-1" / NOTE).write_text("mine")
    assert value_in(write(run, 1)) == 1
    assert (run / "checkpoint-1" / NOTE).read_text() == "mine"
    assert value_in(write(run, 1, value=2)) == 2
    assert (run / "checkpoint-1" / NOTE).read_text() == "mine"
    assert not list(run.glob(".*"))


def test_a_file_of_others_is_not_overwritten(run):
    file = run / "checkpoint-1" / "trainer_state.json"
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    with pytest.raises(SpeculatorError, match="trainer_state.json belongs to no state of this run"):
        write(run, 1)
    assert file.read_text() == "theirs"
    file.rename(run / "theirs.json")
    tidy(run)  # the state was whole, and only its name was taken
    assert value_in(run / "checkpoint-1") == 1


def test_a_write_that_fails_leaves_nothing(run, monkeypatch):
    write(run, 1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_folder, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write(run, 2)
    assert [path.name for path in run.iterdir()] == ["checkpoint-1"]


def test_wrong_calls_are_refused(run):
    with pytest.raises(ValueError, match="expected checkpoint-<step>"):
        write_whole(run / "state", contents(1))
    with pytest.raises(ValueError, match="expected checkpoint-<step>"):
        write_whole(run / "checkpoint-1", {WEIGHTS: {}})
    with pytest.raises(ValueError, match="keep must be at least 1, found 0"):
        rotate_states(run, keep=0)


# ---- kill -9, before each call in turn that changes the folder ----


def plain(run):
    """The next state, and the one before it goes."""
    write(run, 4)
    rotate_states(run, keep=1)


def again(run):
    """A state in the place of another one."""
    write(run, 2, value=4)


def beside(run):
    """The same, where somebody else has put a file."""
    (run / "checkpoint-2" / NOTE).write_text("mine")
    again(run)


def die_at(moment):
    count = itertools.count()

    def patched(original):
        def call(*args, **kwargs):
            if next(count) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, patched(getattr(os, name)))


def killed(work, run, moment) -> bool:
    child = os.fork()
    if child == 0:
        die_at(moment)
        work(run)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_everywhere(work, folder: Path, log: Path) -> None:
    """In a process without threads: a child for each moment, until one lives to the end."""
    complaints: list[str] = []
    state_folder.logger.addFilter(lambda record: complaints.append(record.getMessage()))
    for moment in itertools.count():
        run = folder / str(moment)
        write(run, 2)
        was_killed = killed(work, run, moment)
        complaints.clear()
        before = newest_state(run)
        if work is plain:
            assert value_in(before) in (2, 4), moment
        tidy(run)
        after = newest_state(run)
        assert value_in(after) in (2, 4), moment
        assert before is None or value_in(after) >= value_in(before), moment
        assert not complaints, moment  # half of a state is none, not a damaged one
        assert not list(run.glob(".*")) and not list(run.glob(f"*/{UNFINISHED}")), moment
        write(run, 6)
        rotate_states(run, keep=1)
        assert states_in(run) == ["checkpoint-6"]
        files = [path.name for path in run.rglob("*") if path.parent.name != "checkpoint-6"]
        allowed = {"checkpoint-2", "checkpoint-4", "checkpoint-6"}  # those are empty
        assert set(files) <= allowed | ({NOTE} if work is beside else set()), moment
        if work is beside and moment > 0:
            assert (run / "checkpoint-2" / NOTE).read_text() == "mine"
        if not was_killed:
            log.write_text(str(moment))
            return


@pytest.mark.parametrize("work", [plain, again, beside])
def test_a_kill_at_any_moment_leaves_a_whole_state(work, tmp_path):
    log = tmp_path / "log"
    process = processes.Process(target=kill_everywhere, args=(work, tmp_path / "runs", log))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    assert int(log.read_text()) > 15
