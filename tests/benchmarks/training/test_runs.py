import json

import pytest

from benchmarks.training import runs as training_runs
from benchmarks.training.runs import train_draft, write_data
from benchmarks.training.settings import RunsBenchmarkConfig
from speculators_core.training.rows.sources import Split, StoredExamples
from speculators_core.training.train import TrainReport
from tests.data import INTEROP


@pytest.fixture(scope="module")
def settings():
    return RunsBenchmarkConfig(rows=12, length=64)


@pytest.fixture(scope="module")
def work(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    write_data(settings, folder)
    return folder


def test_rows_are_full(work):
    rows = [json.loads(line)["input_ids"] for line in (work / "rows.jsonl").open()]
    assert [len(row) for row in rows] == [64] * 12
    assert (work / "states" / "report.json").exists()


def test_a_run_ends_with_a_speculator_that_can_be_measured(settings, work, tmp_path):
    report = train_draft(
        settings,
        "mtp",
        {
            "model": {"draft_config": str(INTEROP / "mtp" / "config.json")},
            "data": {"store": str(work / "states")},
        },
        tmp_path / "run",
    )
    assert report.steps == 12 and report.speculator == tmp_path / "run" / "speculator"


def test_trainer_and_bare_steps_are_timed_in_turns(settings, work, monkeypatch):
    monkeypatch.setattr(training_runs, "STEPS", 6)
    ours, bare = training_runs._step_rates(settings, work, "mtp")
    assert ours > 0 and bare > 0


def test_online_and_from_the_store_the_same_rows_are_held_out(settings, work, monkeypatch):
    monkeypatch.setattr(training_runs, "in_process", lambda function, *args: function(*args))
    monkeypatch.setattr(training_runs, "_alone", training_runs._run_side)
    (line, *losses) = training_runs.measure_online(settings, ["mtp"], work)
    assert line.ours > 0 and line.reference > 0
    first = [json.loads(next((work / "online.jsonl").open()))["input_ids"]]
    stored = StoredExamples(work / "states")
    (number,) = Split.draw(stored, 1, None, settings.seeds[0]).held_out
    assert [example.input_ids.tolist() for example in stored.read([number])] == first
    assert losses and all(loss.ours > 0 and loss.reference > 0 for loss in losses)


def test_beside_a_peer_stands_the_median_of_the_seeds(settings, monkeypatch, tmp_path):
    def answer(function, *arguments):
        if function is train_draft:
            _, _, sections, _ = arguments
            return TrainReport(speculator=f"seed {sections['run']['seed']}", steps=1)
        return {"seed 4": 1.0, "seed 5": 3.0, "seed 6": 2.0}.get(arguments[-1], 1.6)

    monkeypatch.setattr(training_runs, "in_process", answer)
    several = settings.model_copy(update={"seeds": (4, 5, 6), "trainers": ("ours",)})
    (line,) = training_runs.measure_peers(several, ["mtp"], tmp_path)
    assert (line.ours, line.reference) == (2.0, 1.6)
