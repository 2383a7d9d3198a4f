import subprocess
import sys

import pytest
import torch

from benchmarks.training import peer_steps
from benchmarks.training import steps as training_steps
from benchmarks.training.parts import run
from benchmarks.training.settings import StepsBenchmarkConfig, TrainingBenchmarkConfig
from benchmarks.training.steps import StepFigures, measure
from speculators_core.console import console


def test_every_draft_is_measured(monkeypatch):
    monkeypatch.setattr(training_steps, "measure", training_steps._measure_here)
    steps = StepsBenchmarkConfig(lengths=(32, 64), timed=1, hidden_size=64, vocab_size=64)
    with console.capture() as shown:
        run(settings=TrainingBenchmarkConfig(parts=("steps",), steps=steps))
    lines = shown.get().splitlines()
    for algorithm in ("eagle3", "peagle", "dflash", "mtp"):
        assert sum(algorithm in line for line in lines) == 2


def test_a_peers_steps_are_timed_in_turns(monkeypatch, tmp_path):
    (tmp_path / "speculators").mkdir()
    turns = []

    def measured(function, settings, algorithm, length):
        turns.append(function)
        mine = function is training_steps._measure_here
        peak = {"algorithm": algorithm, "length": length, "peak_bytes": 1}
        return StepFigures(seconds=next(ours), **peak) if mine else next(theirs)

    ours, theirs = iter([3.0, 1.0, 2.0]), iter([6.0, 9.0, 8.0])
    monkeypatch.setattr(training_steps, "in_process", measured)
    steps = StepsBenchmarkConfig(lengths=(32,), peer=tmp_path)
    with console.capture() as shown:
        run(settings=TrainingBenchmarkConfig(parts=("steps",), algorithms=("mtp",), steps=steps))
    assert turns == [training_steps._measure_here, training_steps._measure_peer] * 3
    assert "4.00" in shown.get()  # medians of 2 s and 8 s
    row = training_steps._row(steps, 32, torch.device("cpu"), torch.float32)
    assert peer_steps._arguments("eagle3", row, None)["input_ids"].shape == (1, 31)
    assert peer_steps._arguments("dflash", row, None)["max_anchors"] == 4


def test_figures_come_from_a_process_of_their_own():
    settings = StepsBenchmarkConfig(timed=1, hidden_size=64, vocab_size=64)
    figures = measure(settings, "mtp", 64)
    assert figures.tokens_per_s == 64 / figures.seconds > 0
    assert figures.peak_bytes >= 0


def test_growth_is_the_exponent_of_the_length():
    before = StepFigures(algorithm="mtp", length=10, seconds=1.0, peak_bytes=100)
    after = StepFigures(algorithm="mtp", length=20, seconds=4.0, peak_bytes=200)
    assert training_steps._growth("seconds", before, after) == "2.00"
    assert training_steps._growth("peak_bytes", before, after) == "1.00"
    assert training_steps._growth("seconds", None, after) == "-"


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": {"lengths": (8,)}},
        {"algorithms": ("other",)},
        {"steps": {"timed": 0}},
        {"parts": ()},
        {"runs": {"rows": 7}},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong):
    with pytest.raises(ValueError):
        TrainingBenchmarkConfig(**wrong)


def test_equal_lengths_have_no_growth():
    same = StepFigures(algorithm="mtp", length=10, seconds=1.0, peak_bytes=100)
    assert training_steps._growth("seconds", same, same) == "-"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps.lengths", "5"], "greater than or equal to 16"),
        (["--foo", "3"], "--foo"),
        (["--steps.hidden-size", "160"], "multiple of 64"),
        (["--parts", "steps", "--steps.peer", "nowhere"], "nowhere has no folder speculators"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", *flags], capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
