"""A run's folder is taken once, gone on with by the same plan, and never overwritten."""

import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest
import yaml

from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError
from speculators_core.training.settings import TrainingPlan, read_training_plan
from speculators_core.training.states import run_folder
from speculators_core.training.states.run_folder import (
    CHANGEABLE_ON_RESUME,
    CONFIG,
    PROVENANCE,
    REPORT,
    SPECULATOR,
    check_folder,
    in_full,
    is_finished,
)
from tests.data_generation.making import generated, schema
from tests.data_generation.processes import processes
from tests.training.states.test_state_folder import write

COMMAND = ["speculators", "train", "--config", "a b.yaml", "--engine.api-key", "sk-1"]


def make_plan(folder, **changes):
    """``changes`` are options by their full names, dots as two underscores."""
    sections = {
        "model": {"algorithm": "eagle3", "verifier": "owner/verifier", "recipe": {"num_layers": 2}},
        "data": {"store": folder / "states"},
        "run": {"output": folder / "run"},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        sections.setdefault(section, {})[key] = value
    return TrainingPlan.read(sections, "test")


@contextmanager
def claim(plan, command):
    """Taken, and started."""
    with run_folder.claim(plan) as claimed:
        claimed.start(command)
        yield claimed


def save_state(plan):
    """Something is lost with this run."""
    write(plan.run.output, 1)


def record_in(plan):
    return json.loads((plan.run.output / PROVENANCE).read_text())


@contextmanager
def standing_in(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_a_new_folder_is_taken(tmp_path):
    plan = make_plan(tmp_path)
    with claim(plan, COMMAND) as claimed:
        assert claimed.path == plan.run.output
        assert not claimed.is_resumed and not is_finished(plan)
    (start,) = record_in(plan)["starts"]
    assert start["command"] == "speculators train --config 'a b.yaml' --engine.api-key '***'"
    assert start["environment"].keys() >= {"torch", "transformers", "python", "device"}
    assert start["started_at"].endswith("+00:00")
    assert "sk-1" not in (plan.run.output / PROVENANCE).read_text()


def test_an_empty_folder_is_taken(tmp_path):
    plan = make_plan(tmp_path)
    plan.run.output.mkdir()
    (plan.run.output / ".hidden").write_text("of the file system")
    with claim(plan, COMMAND) as claimed:
        assert not claimed.is_resumed


def test_the_config_reruns_the_run(tmp_path):
    plan = make_plan(tmp_path, run__trackers=("wandb",), optimizer__learning_rate=1e-5)
    with claim(plan, COMMAND):
        pass
    config = plan.run.output / CONFIG
    assert read_training_plan(config) == in_full(plan)
    options = yaml.safe_load(config.read_text())
    assert options["optimizer"]["schedule"] == "cosine"  # a default is written out
    with claim(read_training_plan(config), COMMAND) as claimed:
        assert claimed.is_resumed


def test_a_run_of_the_same_plan_is_gone_on_with(tmp_path):
    plan = make_plan(tmp_path)
    with claim(plan, COMMAND):
        write(plan.run.output, 1)
        write(plan.run.output, 2).rename(plan.run.output / ".checkpoint-2.part")
        (plan.run.output / "notes.txt").write_text("mine")
    config = (plan.run.output / CONFIG).read_bytes() + b"# mine"
    (plan.run.output / CONFIG).write_bytes(config)
    with claim(make_plan(tmp_path, run__keep=9), [*COMMAND, "again"]) as claimed:
        assert claimed.is_resumed
        assert (plan.run.output / "checkpoint-2").is_dir()  # it was whole but for its name
    starts = record_in(plan)["starts"]
    assert [start["command"].endswith("again") for start in starts] == [False, True]
    assert (plan.run.output / CONFIG).read_bytes() == config
    assert (plan.run.output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer__learning_rate": 0.002}, "optimizer.learning_rate 0.001, now it is 0.002"),
        ({"run__seed": 1, "run__max_steps": 5}, "run.max_steps None, now it is 5"),
        ({"model__recipe": {"num_layers": 3}}, "model.recipe.num_layers 2, now it is 3"),
        ({"model__recipe": {}}, "model.recipe.num_layers 2, now it is None"),
        ({"data__row_length": 64, "run__keep": 5}, "data.row_length 2048, now it is 64"),
    ],
)
def test_a_run_of_another_plan_is_refused(tmp_path, changes, said):
    plan = make_plan(tmp_path)
    with claim(plan, COMMAND):
        save_state(plan)
    before = content_of(plan.run.output)
    for enter in (check_folder, lambda other: claim(other, COMMAND).__enter__()):
        with pytest.raises(SpeculatorError, match=f"holds a run with {said}. Use the same options"):
            enter(make_plan(tmp_path, **changes))
    assert content_of(plan.run.output) == before


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_saved_nothing_makes_room_for_another_plan(tmp_path, caplog):
    with claim(make_plan(tmp_path), COMMAND):
        pass
    plan = make_plan(tmp_path, run__seed=1)
    with caplog.at_level("INFO"), claim(plan, COMMAND) as claimed:
        assert not claimed.is_resumed
        save_state(plan)
    assert "replaced a run of another plan in" in caplog.text
    assert read_training_plan(plan.run.output / CONFIG) == in_full(plan)
    assert len(record_in(plan)["starts"]) == 1
    with claim(plan, COMMAND) as claimed:
        assert claimed.is_resumed


def test_until_it_is_started_nothing_is_left_behind(tmp_path):
    plan = make_plan(tmp_path, run__output=tmp_path / "runs" / "one")
    with run_folder.claim(plan) as claimed:
        assert claimed.path.is_dir()
    assert list(tmp_path.iterdir()) == []
    claimed.path.mkdir(parents=True)
    with run_folder.claim(plan):
        pass
    assert claimed.path.is_dir()


FREE_CHANGES = {
    "model.trust_remote_code": True,
    "data.num_workers": 3,
    "data.queue_size": 7,
    "run.save_every": 5,
    "run.keep": 9,
    "run.log_every": 99,
    "run.gradient_checkpointing": True,
    "run.compile": True,
    "run.fsdp": True,
    "run.deepspeed": "zero.json",
    "run.check": False,
    "run.trackers": ("tensorboard",),
    "run.license": "mit",
}


@pytest.mark.parametrize("name", FREE_CHANGES)
def test_what_leaves_the_draft_as_it_is_may_change(tmp_path, name):
    assert {*FREE_CHANGES, "run.output"} == CHANGEABLE_ON_RESUME
    (tmp_path / "q.yaml").write_text(
        "{data: {verifier: v, datasets: [{path: p}]}, sync: {kind: zmq, urls: ['tcp://h:1']}}"
    )
    queue = {"data__store": None, "data__queue": tmp_path / "q.yaml", "run__max_steps": 9}
    own = queue if name == "data.queue_size" else {}
    if name == "run.deepspeed":
        own = {"optimizer__name": "adamw"}
    with claim(make_plan(tmp_path, **own), COMMAND):
        pass
    changed = make_plan(tmp_path, **own, **{name.replace(".", "__"): FREE_CHANGES[name]})
    assert changed != make_plan(tmp_path, **own)
    with claim(changed, COMMAND) as claimed:
        assert claimed.is_resumed


def test_a_folder_that_was_moved_is_gone_on_with(tmp_path):
    plan = make_plan(tmp_path)
    with claim(plan, COMMAND):
        pass
    plan.run.output.rename(tmp_path / "elsewhere")
    with claim(make_plan(tmp_path, run__output=tmp_path / "elsewhere"), COMMAND) as claimed:
        assert claimed.is_resumed


def test_an_option_that_the_record_does_not_know_has_its_default(tmp_path):
    """The run was started by a version without it."""
    plan = make_plan(tmp_path)
    with claim(plan, COMMAND):
        save_state(plan)
    record = record_in(plan)
    del record["plan"]["optimizer"]["max_grad_norm"]
    (plan.run.output / PROVENANCE).write_text(json.dumps(record))
    check_folder(plan)
    with pytest.raises(SpeculatorError, match="max_grad_norm 1.0, now it is 2.0"):
        check_folder(make_plan(tmp_path, optimizer__max_grad_norm=2.0))


def test_other_weights_in_the_verifiers_folder_are_another_plan(tmp_path, verifier_folder):
    folder = shutil.copytree(verifier_folder, tmp_path / "verifier")
    plan = make_plan(tmp_path, model__verifier=str(folder))
    with claim(plan, COMMAND):
        save_state(plan)
    check_folder(plan)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(SpeculatorError, match="holds a run with weights of model.verifier '"):
        check_folder(plan)


@pytest.mark.parametrize(
    "processes_before, rows, now, rows_now, is_same",
    [
        (1, 4, 2, 2, True),
        (2, 1, 1, 1, False),
        (2, 2, 1, 2, False),
    ],
)
def test_rows_of_a_step_are_counted_over_all_processes(
    tmp_path, monkeypatch, processes_before, rows, now, rows_now, is_same
):
    plan = make_plan(tmp_path, optimizer__rows_per_step=rows)
    monkeypatch.setenv("WORLD_SIZE", str(processes_before))
    with claim(plan, COMMAND):
        save_state(plan)
    monkeypatch.setenv("WORLD_SIZE", str(now))
    plan = make_plan(tmp_path, optimizer__rows_per_step=rows_now)
    if is_same:
        assert check_folder(plan)
    else:
        said = (
            f"rows_per_step of all processes {processes_before * rows}, now it is {now * rows_now}"
        )
        with pytest.raises(SpeculatorError, match=said):
            check_folder(plan)


def test_other_examples_in_the_store_are_another_plan(tmp_path):
    def write_store(length):
        shutil.rmtree(tmp_path / "states", ignore_errors=True)
        store = DiskStore.create(tmp_path / "states", schema())
        store.write(generated(0, length, store.schema))
        store.close()

    plan = make_plan(tmp_path)
    write_store(8)
    with claim(plan, COMMAND):
        save_state(plan)
    write_store(8)
    assert check_folder(plan)
    write_store(9)
    with pytest.raises(SpeculatorError, match="holds a run with content of data.store '"):
        check_folder(plan)


def test_other_texts_prompts_or_options_of_them_are_another_plan(tmp_path):
    rows, prompts, config = (tmp_path / name for name in ("rows.jsonl", "prompts.jsonl", "d.yaml"))
    options = {"verifier": "owner/verifier", "datasets": [{"path": str(rows)}]}
    plan = make_plan(
        tmp_path, data__store=None, data__texts=config, evaluation__prompts=str(prompts)
    )
    contents = {rows: "{}", prompts: "{}", config: yaml.safe_dump({"data": options})}
    for path, text in contents.items():
        path.write_text(text)
    with claim(plan, COMMAND):
        save_state(plan)
    assert check_folder(plan)
    other = yaml.safe_dump({"data": options, "engine": {"max_length": 9}})
    for path, text, said in (
        (rows, "[]", f"content of {rows} '"),
        (prompts, "[]", f"content of {prompts} '"),
        (config, other, "engine.max_length of data.texts 2048, now it is 9"),
    ):
        path.write_text(text)
        with pytest.raises(SpeculatorError, match=f"holds a run with {said}"):
            check_folder(plan)
        path.write_text(contents[path])


def test_a_plan_says_the_same_in_every_directory(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name / "verifier").mkdir(parents=True)
    relative = {"data": {"store": "states"}, "run": {"output": str(tmp_path / "run")}}
    plan = {**relative, "model": {"algorithm": "mtp", "verifier": "verifier"}}
    with standing_in(tmp_path / "here"):
        with claim(TrainingPlan.read(plan, "test"), COMMAND) as claimed:
            save_state(claimed.plan)
        check_folder(TrainingPlan.read(plan, "test"))
    config = read_training_plan(tmp_path / "run" / CONFIG)
    assert config.data.store == tmp_path / "here" / "states"
    assert config.model.verifier == str(tmp_path / "here" / "verifier")
    check_folder(config)
    with standing_in(tmp_path / "there"), pytest.raises(SpeculatorError, match="model.verifier"):
        check_folder(TrainingPlan.read(plan, "test"))


# ---- folders of others ----


@pytest.mark.parametrize("name", ["thesis.tex", CONFIG, "checkpoint-7"])
def test_a_folder_with_something_else_is_left_alone(tmp_path, name):
    plan = make_plan(tmp_path)
    plan.run.output.mkdir()
    (plan.run.output / name).write_text("mine")
    with (
        pytest.raises(SpeculatorError, match=f"holds {name} and not a run; expected a run, or"),
        claim(plan, COMMAND),
    ):
        pass
    assert [(path.name, path.read_text()) for path in plan.run.output.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("text", ["{}", "no json", '{"format": "speculators-run-1"}'])
def test_a_record_that_is_none_is_said_in_one_line(tmp_path, text):
    plan = make_plan(tmp_path)
    plan.run.output.mkdir()
    (plan.run.output / PROVENANCE).write_text(text)
    with (
        pytest.raises(SpeculatorError, match="run.json is not the record of a training run"),
        claim(plan, COMMAND),
    ):
        pass
    assert (plan.run.output / PROVENANCE).read_text() == text


def test_a_file_in_the_place_of_the_folder_is_said_in_one_line(tmp_path):
    plan = make_plan(tmp_path)
    plan.run.output.write_text("a file")
    with pytest.raises(SpeculatorError, match="run cannot be written"), claim(plan, COMMAND):
        pass


def hold(plan, ready):
    with claim(plan, COMMAND):
        ready.touch()
        time.sleep(60)


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path):
    plan, ready = make_plan(tmp_path), tmp_path / "ready"
    process = processes.Process(target=hold, args=(plan, ready))
    process.start()
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(SpeculatorError, match="another run is writing"), claim(plan, COMMAND):
        pass
    process.kill()
    process.join()
    with claim(plan, COMMAND) as claimed:
        assert claimed.is_resumed


def test_who_comes_second_finds_the_plan_of_the_first(tmp_path, monkeypatch):
    plan, locked = make_plan(tmp_path), run_folder.locked

    @contextmanager
    def locked_late(folder):
        """After the first look, and after another run has come and gone."""
        monkeypatch.setattr(run_folder, "locked", locked)
        with claim(make_plan(tmp_path, run__seed=7), COMMAND):
            save_state(plan)
        with locked(folder):
            yield

    monkeypatch.setattr(run_folder, "locked", locked_late)
    with pytest.raises(SpeculatorError, match="run.seed 7, now it is 0"), claim(plan, COMMAND):
        pass


# ---- finished runs, and where they came from ----


def test_a_run_is_finished_when_its_speculator_and_its_report_are_there(tmp_path):
    plan = make_plan(tmp_path)
    with claim(plan, COMMAND) as claimed:
        (claimed.path / SPECULATOR).mkdir()
        assert not is_finished(plan)
        (claimed.path / REPORT).write_text("{}")
        assert is_finished(plan)
    (claimed.path / SPECULATOR).rename(claimed.path / "away")
    assert not is_finished(plan)
    (claimed.path / "away").rename(claimed.path / SPECULATOR)
    with pytest.raises(SpeculatorError, match="run.seed 0, now it is 3"):
        check_folder(make_plan(tmp_path, run__seed=3))


def git(*arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


def test_the_commit_of_the_current_directory_is_written_down(tmp_path, monkeypatch):
    (tmp_path / "repository").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    found = []

    def start():
        plan = make_plan(tmp_path)
        with claim(plan, COMMAND):
            pass
        found.append(record_in(plan)["starts"][-1]["git"])

    with standing_in(tmp_path / "repository"):
        start()
        git("init")
        start()
        (tmp_path / "repository" / "file").write_text("one")
        git("add", "file")
        git("commit", "-m", "one")
        start()
        (tmp_path / "repository" / "untracked").write_text("a run's output")
        start()
        (tmp_path / "repository" / "file").write_text("two")
        start()
        monkeypatch.setenv("PATH", "")
        start()
    assert found[0] is found[1] is found[5] is None
    assert len(found[2]["commit"]) == 40
    assert [git["is_dirty"] for git in found[2:5]] == [False, False, True]
