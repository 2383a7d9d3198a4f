"""Runs on DeepSpeed's ZeRO, and what is refused of its options."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from speculators_core.errors import SpeculatorError
from speculators_core.training import zero
from tests.training.making import plan_of, weights_of
from tests.training.test_ranks import assert_close, losses, train_with

HAS_DEEPSPEED = find_spec("deepspeed") is not None
ADAMW = {"name": "adamw", "weight_decay": 0.01}
STEPS = 20


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_resumes_and_saves_what_ddp_does(given, tmp_path, free_port, stage):
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    run = {"saved_dtype": "float32", "max_steps": STEPS, "log_every": 1}
    with_zero = run | {"deepspeed": str(config)}
    plan = plan_of(given, tmp_path / "zero", "eagle3", run=with_zero, optimizer=ADAMW)
    train_with(plan, free_port, stopped=True)
    assert not (tmp_path / "zero" / "speculator").exists()
    train_with(plan, free_port)
    train_with(plan_of(given, tmp_path / "ddp", "eagle3", run=run, optimizer=ADAMW), free_port)
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-4)
    ours, ddp = (weights_of(tmp_path / name / "speculator") for name in ("zero", "ddp"))
    assert_close(ours, ddp, 1e-4)
    # Its state is that of a run without DeepSpeed, which goes further from there.
    state = max((tmp_path / "zero").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    assert kinds(state) == kinds(tmp_path / "ddp" / state.name)


def kinds(state):
    files = ("weights.safetensors", "optimizer.safetensors")
    return {
        f"{file} {name}": tensor.shape
        for file in files
        for name, tensor in load_file(state / file).items()
    }


def test_deepspeed_that_is_absent_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(SpeculatorError, match="DeepSpeed is not installed. Run `pip install"):
        zero.read_deepspeed_config(tmp_path / "zero.json")


@pytest.mark.parametrize("section", zero.DECIDED)
def test_sections_that_the_plan_decides_are_refused(tmp_path, monkeypatch, section):
    monkeypatch.setattr(zero, "find_spec", lambda name: name)
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({section: {}}))
    with pytest.raises(SpeculatorError, match=f"the section {section} is decided by the plan"):
        zero.read_deepspeed_config(path)
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5}))
    read = zero.read_deepspeed_config(path)
    assert read["gradient_clipping"] == 0.5 and read["train_batch_size"] == "auto"


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"run": {"deepspeed": "z.json", "fsdp": True}, "optimizer": ADAMW}, "exclude each other"),
        ({"run": {"deepspeed": "z.json"}}, "optimizer.name muon: run.deepspeed"),
    ],
)
def test_options_that_do_not_go_together_are_refused(given, tmp_path, sections, complaint):
    with pytest.raises(SpeculatorError, match=complaint):
        plan_of(given, tmp_path / "run", **sections)


def test_a_weight_that_does_not_split_evenly_is_placed_with_padding(monkeypatch):
    monkeypatch.setattr(zero.dist, "get_world_size", lambda: 2)
    pieces = []
    for rank in range(2):
        monkeypatch.setattr(zero.dist, "get_rank", lambda rank=rank: rank)
        piece = torch.full((2,), 9.0)
        states = zero.ZeroStates.__new__(zero.ZeroStates)
        states._is_stage_3 = True
        states._zero = SimpleNamespace(
            _get_fp32_opt_state_partition=lambda *_, piece=piece: (piece, 0)
        )
        states._place(torch.empty(0), "exp_avg", torch.tensor([1.0, 2.0, 3.0]))
        pieces += piece.tolist()
    assert pieces == [1.0, 2.0, 3.0, 0.0]
