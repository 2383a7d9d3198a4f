import dataclasses
import itertools

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from speculators_core.batch import Batch
from speculators_core.errors import SpeculatorError
from speculators_core.model import SpeculatorModel
from speculators_core.training.batches import pack
from speculators_core.training.optimizers import MuonAdamW
from speculators_core.training.trainer import PackedDocuments, SpeculatorTrainer, run_verifier
from tests.conftest import SMALL_RECIPES, make_batch, make_draft, make_eagle3


def documents(num=24, length=20):
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(3, 96, (num, length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": rows, "loss_mask": [[1] * length] * num})


def train(model, folder, **arguments):
    kwargs, eval_kwargs = model.get_trainer_kwargs(ttt_steps=2)
    trainer = SpeculatorTrainer(
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
        train_dataset=PackedDocuments(documents(), 40),
        eval_dataset=PackedDocuments(documents(4), 40),
        optimizers=(MuonAdamW(model, 5e-3), None),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("lengths", "row_length"),
    [((7, 9), 20), ((7, 9), 16), ((8, 8, 8), 24), ((4, 5), 9), ((3, 15, 2), 20), ((6,), 6)],
)
def test_verifier_sees_each_document_alone(verifier, lengths, row_length):
    """Whether they are run in their row, or side by side because their lengths are alike."""
    packed = make_batch(verifier, lengths, row_length)
    for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
        ids = packed.input_ids[0, end - length : end].tolist()
        alone = run_verifier(
            verifier, pack([{"input_ids": ids, "loss_mask": [1] * length}], length), (1, 2, 3)
        )
        for name in ("hidden_states", "last_hidden_states"):
            together = getattr(packed, name)[:, end - length : end]
            assert torch.allclose(together, getattr(alone, name), atol=1e-4)


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
    rows = PackedDocuments(documents(4), 40)
    expected = []
    for index in range(len(rows)):
        batch = run_verifier(verifier, rows[index], (1, 2, 3))
        with torch.no_grad():
            _, loss, _ = model(batch, **trainer.eval_kwargs)
        expected.append(loss.item())
    assert metrics["eval_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


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
