"""Several processes train what one would."""

import pytest
import torch

from speculators_core.models.speculator import SpeculatorModel
from speculators_core.training.states.state import read_weights
from speculators_core.training.train import train
from tests.conftest import SMALL_RECIPES
from tests.data_generation.processes import processes
from tests.training.making import log_of, plan_of, weights_of
from tests.training.running import train_as_rank

EXACT = {"run": {"saved_dtype": "float32", "max_steps": 4}}


def train_with(plan, port, world_size=2, stopped=False):
    started = [
        processes.Process(
            target=train_as_rank, args=(plan.model_dump_json(), rank, world_size, port, stopped)
        )
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=200)
    assert [process.exitcode for process in started] == [0] * world_size


def assert_close(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], atol=tolerance), name


def losses(run):
    return [line["loss"] for line in log_of(run) if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["eagle3", "mtp"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_give_the_losses_and_weights_of_one(
    given, tmp_path, free_port, algorithm, fsdp
):
    """Rows of unequal numbers of trained tokens, two a step: on two processes, or one by one.

    The fifth row, the last of an epoch, has a step for itself.
    """
    # Muon iterates in bfloat16: what differs in the last bit of a gradient grows to 2^-8 of a step.
    optimizer = {"name": "adamw", "weight_decay": 0.01}
    few = {"data": {"limit": 16}}
    changes = {**EXACT, **few, "optimizer": {**optimizer, "rows_per_step": 2}}
    alone = train(plan_of(given, tmp_path / "alone", algorithm, **changes))
    spread = {**few, "optimizer": optimizer, "run": {**EXACT["run"], "fsdp": fsdp}}
    train_with(plan_of(given, tmp_path / "spread", algorithm, **spread), free_port)
    speculator = tmp_path / "spread" / "speculator"
    assert_close(weights_of(speculator), weights_of(alone.speculator))
    assert losses(tmp_path / "spread") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    ours, expected = log_of(tmp_path / "spread")[-1], log_of(tmp_path / "alone")[-1]
    evaluations = [
        [line for line in log_of(tmp_path / run) if "eval_loss" in line][-1]
        for run in ("spread", "alone")
    ]
    for name, value in evaluations[1].items():
        if name == "epoch":  # counts the row that two processes take twice
            continue
        assert evaluations[0][name] == pytest.approx(value, rel=1e-4), name
    assert ours.keys() == expected.keys()
    assert SpeculatorModel.from_pretrained(speculator).config.speculators_model_type == algorithm


@pytest.mark.slow
def test_a_sharded_run_that_one_process_hears_to_stop_is_saved_and_goes_on(
    given, tmp_path, free_port
):
    """Bit for bit as if it had not been stopped; its state loads in one process."""
    changes = {"run": {**EXACT["run"], "fsdp": True}}
    run = plan_of(given, tmp_path / "run", **changes)
    train_with(run, free_port, stopped=True)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "run" / "speculator").exists()
    train_with(run, free_port)
    train_with(plan_of(given, tmp_path / "undisturbed", **changes), free_port)
    assert log_of(tmp_path / "run") == log_of(tmp_path / "undisturbed")
    draft = SpeculatorModel.from_pretrained(tmp_path / "run" / "speculator", dtype=torch.float32)
    ended = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    assert_close(ended, weights_of(tmp_path / "undisturbed" / "speculator"), 0.0)
    for weight in draft.parameters():
        weight.data.zero_()
    read_weights(tmp_path / "run" / "checkpoint-4", draft)
    assert_close(draft.state_dict(), ended, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [name for name in SMALL_RECIPES if name != "eagle3"])
def test_every_draft_trains_sharded(given, tmp_path, free_port, algorithm):
    plan = plan_of(given, tmp_path / "run", algorithm, run={"max_steps": 4, "fsdp": True})
    train_with(plan, free_port)
    assert (tmp_path / "run" / "speculator" / "model.safetensors").exists()


def test_online_generation_feeds_one_process(given, tmp_path, monkeypatch):
    from speculators_core.errors import SpeculatorError

    monkeypatch.setenv("WORLD_SIZE", "2")
    data = {"store": None, "online": str(given / "data.yaml")}
    with pytest.raises(SpeculatorError, match="data.online feeds one process, the training has 2"):
        train(plan_of(given, tmp_path / "run", data=data))
