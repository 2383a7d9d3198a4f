"""Batches count by the tokens that they train, however they are split over steps."""

import copy

import pytest
import torch
from transformers import TrainingArguments

from speculators_core.training.trainer import SpeculatorTrainer
from tests.conftest import SMALL_RECIPES, make_draft, pack_texts
from tests.training.making import InMemory

OBJECTIVES: dict[str, dict] = {
    "eagle3": {"ttt_steps": 2},
    "peagle": {"num_depths": 1, "max_anchors": None},
    "dflash": {"max_anchors": 100},
    "mtp": {"num_steps": 1},
}


@pytest.fixture(scope="module")
def texts() -> list[dict]:
    """All tokens of the first are trained, three of the second."""
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1)).tolist()
    masks = [[1] * 20, [0] * 14 + [1] * 3 + [0] * 3]
    return [{"input_ids": i, "loss_mask": m} for i, m in zip(ids, masks, strict=True)]


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
        train_dataset=InMemory(dataset),
        eval_dataset=dataset,
        optimizer=torch.optim.SGD(weights, lr=1.0),
    )
    trainer.train()
    return {name: w.detach().clone() for name, w in model.named_parameters()}


@pytest.mark.parametrize("name", SMALL_RECIPES)
def test_a_batch_counts_by_its_trained_tokens(verifier, texts, tmp_path, name):
    model = make_draft(name, verifier)
    by_hand = copy.deepcopy(model).train()
    kwargs, _ = by_hand.get_trainer_kwargs(**OBJECTIVES[name])
    batches = [pack_texts(verifier, [text], 20, model.aux_layer_ids) for text in texts]
    counts = [int(batch.loss_mask.sum()) for batch in batches]
    assert counts == [20, 3]
    total = sum(n * by_hand(b, **kwargs)[1] for n, b in zip(counts, batches, strict=True))
    (total / sum(counts)).backward()
    weights = trained(model, batches, tmp_path)
    for key, weight in by_hand.named_parameters():
        step = 0.0 if weight.grad is None else weight.grad
        assert torch.allclose(weights[key], weight.detach() - step, atol=1e-6), key
