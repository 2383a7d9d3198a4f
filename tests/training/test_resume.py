"""A run that was killed goes on as if nothing had happened."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from xxhash import xxh3_64

from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError
from speculators_core.training.states.state_folder import MANIFEST, read_manifest
from speculators_core.training.train import train
from tests.conftest import SMALL_RECIPES
from tests.data_generation.processes import processes
from tests.training.making import log_of, plan_of, weights_of
from tests.training.running import (
    KILL,
    TERM,
    train_and_die,
    train_and_stop_evaluating,
    train_here,
)


def run_in_process(target, plan, *arguments):
    process = processes.Process(target=target, args=(plan.model_dump_json(), *arguments))
    process.start()
    process.join(timeout=120)
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SMALL_RECIPES)
def test_a_killed_run_gives_the_same_bytes(given, tmp_path, algorithm):
    """Several rows a step and epochs, draws of rows, bfloat16, and states between evaluations."""
    changes = {
        "optimizer": {"rows_per_step": 2, "name": "muon" if algorithm != "mtp" else "adamw"},
        "run": {"max_steps": None, "epochs": 1.5, "save_every": 3, "dtype": "bfloat16"},
    }
    plan = plan_of(given, tmp_path / "undisturbed", algorithm, **changes)
    assert run_in_process(train_here, plan) == 0
    killed = plan_of(given, tmp_path / "killed", algorithm, **changes)
    draw = random.Random(algorithm)
    for _ in range(2):
        assert run_in_process(train_and_die, killed, draw.randrange(2, 9), KILL) == -KILL
    assert run_in_process(train_here, killed) == 0
    ours = weights_of(tmp_path / "killed" / "speculator")
    expected = weights_of(tmp_path / "undisturbed" / "speculator")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "undisturbed")


def test_sigterm_saves_first(given, tmp_path):
    plan = plan_of(given, tmp_path / "run", run={"save_every": 100, "max_steps": 8})
    assert run_in_process(train_and_die, plan, 2, TERM) == 0
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "run" / "speculator").exists()
    report = train(plan)
    assert report.steps == 8
    undisturbed = train(plan_of(given, tmp_path / "other", run={"max_steps": 8}))
    ours, expected = weights_of(report.speculator), weights_of(undisturbed.speculator)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_sigterm_does_not_wait_for_an_evaluation_which_is_made_up_for(given, tmp_path):
    plan = plan_of(given, tmp_path / "run", evaluation={"every": 2})
    assert run_in_process(train_and_stop_evaluating, plan, 2) == 0
    assert (tmp_path / "run" / "checkpoint-4").exists()
    assert not [x for x in log_of(tmp_path / "run") if x["step"] == 4 and "eval_loss" in x]
    assert run_in_process(train_here, plan) == 0
    undisturbed = plan_of(given, tmp_path / "other", evaluation={"every": 2})
    assert run_in_process(train_here, undisturbed) == 0
    assert log_of(tmp_path / "run") == log_of(tmp_path / "other")
    ours = weights_of(tmp_path / "run" / "speculator")
    expected = weights_of(tmp_path / "other" / "speculator")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_run_that_was_killed_while_it_ended_trains_no_step_more(given, tmp_path):
    """Nor one whose speculator was removed; an evaluation that is missing is made up for."""
    plan, run = plan_of(given, tmp_path / "run", evaluation={"every": 8}), tmp_path / "run"
    report = train(plan)
    first, log = weights_of(report.speculator), log_of(run)
    state = run / "checkpoint-8" / "trainer_state.json"
    for is_evaluated in (True, False):
        if not is_evaluated:
            content = json.loads(state.read_text())
            content["log_history"] = [x for x in content["log_history"] if "eval_loss" not in x]
            rewrite(state, json.dumps(content | {"best_metric": None, "best_global_step": None}))
        (run / "report.json").unlink() if is_evaluated else shutil.rmtree(run / "speculator")
        again = train(plan)
        assert without_times(again) == without_times(report) and again.steps == 8
        assert all(torch.equal(weights_of(again.speculator)[name], first[name]) for name in first)
        assert log_of(run) == log
        assert not list(run.glob(".speculator*"))


def without_times(report):
    figures = {name: v for name, v in report.figures.items() if name != "runtime"}
    return report.model_copy(update={"figures": figures})


def rewrite(path, text):
    """Changes a file of a saved state, and what its manifest says of it."""
    path.write_text(text)
    manifest = read_manifest(path.parent)
    checksum = xxh3_64(text.encode()).hexdigest()
    record = manifest.files[path.name].model_copy(
        update={"size_bytes": len(text.encode()), "checksum": checksum}
    )
    manifest = manifest.model_copy(update={"files": {**manifest.files, path.name: record}})
    manifest = manifest.model_copy(update={"checksum": manifest.expected_checksum})
    (path.parent / MANIFEST).write_text(manifest.model_dump_json())


def test_another_plan_does_not_go_on_in_the_folder(given, tmp_path):
    train(plan_of(given, tmp_path / "run", run={"max_steps": 2}))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(SpeculatorError, match=r"optimizer\.learning_rate.*0\.003.*0\.01"):
        train(plan_of(given, tmp_path / "run", optimizer={"learning_rate": 0.01}))
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_folder_with_something_else_is_left_alone(given, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SpeculatorError, match="notes.txt|not empty"):
        train(plan_of(given, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_loss_that_is_no_number_names_its_example(given, tmp_path):
    source = DiskStore.open(given / "states")
    store = DiskStore.create(
        tmp_path / "states", source.schema, made_from=source.manifest.made_from
    )
    spoiled = "0/7"
    for example in source.read():
        states = example.hidden_states.clone()
        if example.key == spoiled:
            states[5, 1] = float("nan")
        store.write(type(example)(**{**vars(example), "hidden_states": states}))
    store.close()
    plan = plan_of(
        given,
        tmp_path / "run",
        data={"store": str(tmp_path / "states"), "eval_examples": 0},
        evaluation={"decode": False, "roll_outs": 0},
        run={"max_steps": 40, "save_every": 1},
    )
    with pytest.raises(SpeculatorError, match=rf"token 5 of example '{spoiled}'") as caught:
        train(plan)
    assert "\n" not in str(caught.value)
    states = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "speculator").exists()
    for folder in states:
        weights = load_file(folder / "weights.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
