import dataclasses
import math

import pytest
import torch
from accelerate.state import GradientState
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from speculators_core.batch import Batch
from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.training.optimizers import MuonAdamW
from speculators_core.training.stop import Interrupted
from speculators_core.training.trainer import SpeculatorTrainer, _OutOfRows
from tests.conftest import SMALL_RECIPES, make_batch, make_draft, make_eagle3, pack_texts
from tests.training.making import InMemory


def make_rows(verifier, num=12):
    """Each of two texts."""
    generator = torch.Generator().manual_seed(4)
    texts = torch.randint(3, 96, (num, 2, 20), generator=generator)
    return [pack_texts(verifier, [{"input_ids": text} for text in row]) for row in texts]


def make_trainer(model, folder, **arguments):
    kwargs, eval_kwargs = model.get_trainer_kwargs(ttt_steps=2)
    return SpeculatorTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            logging_steps=4,
            **arguments,
        ),
        train_kwargs=kwargs,
        eval_kwargs=eval_kwargs,
        train_dataset=InMemory(make_rows(model.verifier)),
        eval_dataset=make_rows(model.verifier, 2),
        optimizer=MuonAdamW(model, 5e-3),
    )


def train(model, folder, **arguments):
    trainer = make_trainer(model, folder, **arguments)
    trainer.train()
    return trainer


@pytest.fixture
def second_of_two(verifier, tmp_path, monkeypatch):
    """A trainer that takes itself for rank 1 of 2; call it with what rank 0 tells in a gather."""
    trainer = make_trainer(make_eagle3(verifier), tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(TrainingArguments, "process_index", 1)

    def hear(told):
        def gather(own):
            return torch.cat([torch.tensor(told, dtype=own.dtype), own])

        monkeypatch.setattr(trainer.accelerator, "gather", gather)
        return trainer

    return hear


def batch_of(verifier, row=0):
    return {**vars(make_batch(verifier)), "row": torch.tensor([row])}


def test_training_lowers_the_loss_and_saves_what_loads(verifier, tmp_path):
    model = make_eagle3(verifier, name_or_path="none")
    trainer = train(
        model, tmp_path, num_train_epochs=6, save_strategy="epoch", eval_strategy="epoch"
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert {
        "eval_teacher_forced_full_acc_0",
        "eval_teacher_forced_cond_acc_1",
        "eval_loss_1",
    } <= set(logged[-1])
    trainer.save_model(tmp_path / "saved")
    again = SpeculatorModel.from_pretrained(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), again.state_dict()[name]), name
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt*"))


def test_metrics_are_the_models_own(verifier, tmp_path):
    model = make_eagle3(verifier)
    trainer = train(model, tmp_path, max_steps=1, save_strategy="no")
    metrics = trainer.evaluate()
    expected = []
    for batch in make_rows(verifier, 2):
        with torch.no_grad():
            _, loss, _ = model(batch, **trainer.eval_kwargs)
        expected.append(loss.item())
    assert metrics["eval_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_a_row_that_fills_up_the_last_step_of_an_epoch_counts_for_nothing(
    second_of_two, verifier, monkeypatch
):
    trainer = second_of_two([[5, 9, 0, 0]])
    num_trained = int(batch_of(verifier)["loss_mask"].sum())
    trainer.train_dataset = range(5)
    found = []
    for is_end in (False, True):
        monkeypatch.setattr(GradientState, "end_of_dataloader", is_end)
        rows = iter([batch_of(verifier, row) for row in range(2)])
        batches, total = trainer.get_batch_samples(rows, 2, torch.device("cpu"))
        found.append([trainer.compute_loss(trainer.model, b, False, total) for b in batches])
        assert total == 5 + num_trained * (1 if is_end else 2)
    assert all(loss > 0 for loss in found[0])
    assert found[1][0] > 0 and found[1][1] == 0
    assert trainer._means._sums["loss_1"][1] == 3 * num_trained
    trainer.train_dataset = range(6)  # nobody lacks a row
    _, total = trainer.get_batch_samples(iter([batch_of(verifier)] * 2), 2, torch.device("cpu"))
    assert total == 5 + 2 * num_trained


def test_ranks_whose_held_out_rows_are_their_own_take_part_as_often(second_of_two, verifier):
    """Rank 0 has three rows of a stream, this one two, which all count."""
    trainer = second_of_two([[3, 0]])
    trainer.train_dataset = Endless()
    rows = [make_batch(verifier, lengths) for lengths in ((7, 9), (8, 3, 2))]
    passes, expected = [], []
    trainer.model.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        expected = [float(trainer.model(row, **trainer.eval_kwargs)[1]) for row in rows]
        weights = [int(row.loss_mask.sum()) for row in rows]
        passes.clear()
        found = trainer._evaluate_rows(trainer.model, rows)
    assert len(passes) == 3
    mean = sum(w * x for w, x in zip(weights, expected, strict=True)) / sum(weights)
    assert found["loss"] == pytest.approx(mean, rel=1e-5)
    trainer = second_of_two([[0, 1]])  # rank 0 has none to take part with
    assert trainer._evaluate_rows(trainer.model, rows) == {}


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def test_a_rank_that_met_no_fault_names_the_one_that_did(second_of_two, verifier):
    trainer = second_of_two([1])
    trainer._step_batches = [batch_of(verifier)]
    trainer._step_losses = [torch.tensor(1.5)]
    with pytest.raises(SpeculatorError, match="step 1: the loss is not finite on rank 0, whose"):
        trainer._raise_fault(math.nan)
    trainer = second_of_two([0])
    with pytest.raises(SpeculatorError, match="gradient is nan after row 0, whose losses are fin"):
        trainer._raise_fault(math.nan)
    trainer._step_losses = [torch.tensor(math.inf)]
    with pytest.raises(SpeculatorError, match="step 1: the loss is inf on row 0"):
        trainer._raise_fault(math.nan)


def test_no_rank_takes_a_step_that_another_has_no_rows_for(second_of_two, verifier):
    rows = [batch_of(verifier)]
    for told, error in (([[0, 0, 1, 1]], Interrupted), ([[0, 0, 1, 0]], _OutOfRows)):
        trainer = second_of_two(told)
        with pytest.raises(error):
            trainer.get_batch_samples(iter(rows), 1, torch.device("cpu"))
    assert trainer.state.num_input_tokens_seen == 0


def test_same_seed_gives_the_same_weights(verifier, tmp_path):
    weights = []
    for run in ("one", "two"):
        model = make_eagle3(verifier)
        train(model, tmp_path / run, max_steps=3, save_strategy="no", seed=7)
        weights.append(model.fc.weight.detach().clone())
    assert torch.equal(*weights)


def test_model_without_verifier_is_refused(verifier, tmp_path):
    model = make_eagle3(verifier)
    model.detach_verifier()
    with pytest.raises(SpeculatorError, match="no verifier is attached"):
        train(model, tmp_path, max_steps=1)


def test_batch_is_one_record():
    assert dataclasses.is_dataclass(Batch) and Batch.__dataclass_params__.frozen


@pytest.mark.parametrize("name", SMALL_RECIPES)
def test_every_draft_trains_under_bf16_autocast(verifier, name):
    model, batch = make_draft(name, verifier).train(), make_batch(verifier)
    _, exact, _ = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, loss, _ = model(batch)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.1)
    gradients = [w.grad for w in model.parameters() if w.requires_grad and w.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients)
