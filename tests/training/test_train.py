import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from speculators_core.data_generation.lengths import Lengths
from speculators_core.diagnosis.check_report import CheckReport
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.training import finish
from speculators_core.training.rows.sources import Split, StoredExamples
from speculators_core.training.train import train
from tests.conftest import SMALL_RECIPES
from tests.training.making import log_of, plan_of


@pytest.mark.parametrize("algorithm", SMALL_RECIPES)
def test_a_run_ends_with_a_speculator_and_its_papers(given, tmp_path, algorithm):
    run = tmp_path / "run"
    report = train(plan_of(given, run, algorithm))
    assert report.steps == 8 and report.speculator == run / "speculator"
    names = {path.name for path in report.speculator.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "config.yaml",
        "model.safetensors",
        "run.json",
        "training_log.jsonl",
    }
    draft = SpeculatorModel.from_pretrained(report.speculator)
    assert draft.config.speculators_model_type == algorithm
    assert draft.config.verifier.name_or_path == str(given / "verifier")
    evaluations = [line for line in log_of(run) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [4, 8]
    for figure in ("acceptance_length", "predicted_acceptance_length", "joint_1"):
        assert f"eval_{figure}" in evaluations[-1]
    assert any(name.startswith("eval_teacher_forced_") for name in evaluations[-1])
    card = (report.speculator / "README.md").read_text()
    stored = StoredExamples(given / "states")
    trained = Split.draw(stored, 6, None, 0).train
    lengths = Lengths.of(stored.lengths[trained].tolist())
    assert f"{lengths.mean:.0f} tokens on average, at most {lengths.longest}; none longer" in card
    length = evaluations[-1]["eval_acceptance_length"]
    if report.best_step in (None, 8):
        assert f"| held-out examples | {length:.2f} | 3 |" in card
        assert "speculators train --config config.yaml" in card
    assert json.loads((run / "report.json").read_text())["steps"] == 8


def test_a_finished_run_is_reported_and_left_alone(given, tmp_path):
    plan = plan_of(given, tmp_path / "run")
    first = train(plan)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(plan) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (None, "speculators train --config run.yaml"),
        ("speculators_core.__main__", "python -m speculators_core train --config run.yaml"),
    ],
)
def test_a_run_notes_the_command_as_one_types_it(given, tmp_path, monkeypatch, module, expected):
    argv = ["/home/a/venv/bin/speculators", "train", "--config", "run.yaml"]
    monkeypatch.setattr(sys, "argv", argv)
    main = SimpleNamespace(__spec__=module and SimpleNamespace(name=module))
    monkeypatch.setitem(sys.modules, "__main__", main)
    changes = {"evaluation": {"decode": False, "roll_outs": 0}, "run": {"max_steps": 1}}
    train(plan_of(given, tmp_path / "run", **changes))
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["command"] == expected


def test_what_is_checked_is_served_with_the_verifier_that_it_was_trained_with(
    tmp_path, monkeypatch
):
    """Its config may name another place, where the verifier will be for others."""
    asked = []

    def answer(*arguments):
        asked.append(arguments)
        report = CheckReport(speculator=arguments[1])
        return subprocess.CompletedProcess(arguments, 0, report.model_dump_json(), "")

    monkeypatch.setattr(finish, "_command", answer)
    assert finish.check(tmp_path / "speculator", "verifier") == "fit to serve"
    assert asked == [("check", str(tmp_path / "speculator"), "--verifier", "verifier", "--json")]
