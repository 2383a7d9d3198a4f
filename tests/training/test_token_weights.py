"""Batches count by the tokens that they train, however they are split over steps."""

import copy
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from speculators_core.batch import Batch
from speculators_core.training.batches import PackedDocuments, VerifiedDocuments, run_verifier
from speculators_core.training.trainer import SpeculatorTrainer
from tests.conftest import SMALL_RECIPES, make_draft

OBJECTIVES: dict[str, dict] = {
    "eagle3": {"ttt_steps": 2},
    "peagle": {"num_depths": 1, "max_anchors": None},
    "dflash": {"max_anchors": 100},
    "mtp": {"num_steps": 1},
}


@pytest.fixture(scope="module")
def rows() -> PackedDocuments:
    """Two rows: all tokens of the first are trained, three of the second."""
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1)).tolist()
    masks = [[1] * 20, [0] * 14 + [1] * 3 + [0] * 3]
    return PackedDocuments(Dataset.from_dict({"input_ids": ids, "loss_mask": masks}), 20)


def trained(model, dataset, folder):
    """The weights after one step of plain gradient descent over both rows."""
    kwargs, eval_kwargs = model.get_trainer_kwargs(
        **OBJECTIVES[model.config.speculators_model_type]
    )
    weights = [w for w in model.parameters() if w.requires_grad]
    trainer = SpeculatorTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            save_strategy="no",
        ),
        train_kwargs=kwargs,
        eval_kwargs=eval_kwargs,
        train_dataset=dataset,
        optimizers=(torch.optim.SGD(weights, lr=1.0), None),
    )
    trainer.train()
    return {name: w.detach().clone() for name, w in model.named_parameters()}


@pytest.mark.parametrize("name", SMALL_RECIPES)
def test_a_batch_counts_by_its_trained_tokens(verifier, rows, tmp_path, name):
    model = make_draft(name, verifier)
    by_hand = copy.deepcopy(model).train()
    kwargs, _ = by_hand.get_trainer_kwargs(**OBJECTIVES[name])
    batches = [run_verifier(verifier, rows[i], model.aux_layer_ids) for i in range(2)]
    counts = [int(batch.loss_mask.sum()) for batch in batches]
    assert counts == [20, 3]
    total = sum(n * by_hand(b, **kwargs)[1] for n, b in zip(counts, batches, strict=True))
    (total / sum(counts)).backward()
    weights = trained(model, rows, tmp_path)
    for key, weight in by_hand.named_parameters():
        step = 0.0 if weight.grad is None else weight.grad
        assert torch.allclose(weights[key], weight.detach() - step, atol=1e-6), key


def test_states_made_beforehand_train_the_same(verifier, rows, tmp_path):
    one, other = make_draft("eagle3", verifier), make_draft("eagle3", verifier)
    verified = VerifiedDocuments(rows, verifier, one.aux_layer_ids)
    on_the_fly = trained(one, rows, tmp_path / "one")
    for key, weight in trained(other, verified, tmp_path / "other").items():
        assert torch.equal(weight, on_the_fly[key]), key


def test_states_are_held_in_the_type_asked_for(verifier, rows):
    batch = VerifiedDocuments(rows, verifier, (1, 2), torch.bfloat16)[0]
    assert batch.hidden_states.dtype == batch.last_hidden_states.dtype == torch.bfloat16
    assert batch.to(dtype=torch.float32).hidden_states.dtype == torch.float32
    two_rows = {f.name: getattr(batch, f.name).repeat_interleave(2, 0) for f in fields(batch)}
    with pytest.raises(ValueError, match="one packed row, found 2"):
        Batch(**two_rows)
