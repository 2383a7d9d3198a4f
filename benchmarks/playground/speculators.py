"""The playground's speculators: trained on the verifier's states over the same text."""

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from benchmarks.playground.training import training_arguments
from speculators_core.model import SpeculatorModel, load_verifier
from speculators_core.registry import MODELS
from speculators_core.training.optimizers import MuonAdamW
from speculators_core.training.trainer import (
    PackedDocuments,
    SpeculatorTrainer,
    VerifiedDocuments,
)

SEED = 0
ROW_LENGTH = 2048
MASK_TOKEN_ID = 3
NUM_ANSWERS, PROMPT_LENGTH, ANSWER_LENGTH, ANSWERS_AT_A_TIME = 6144, 64, 96, 128


class Pass(BaseModel):
    """A stretch of training over some text."""

    model_config = ConfigDict(frozen=True)
    num_epochs: float
    learning_rate: float
    rows_per_step: int = 1


class Plan(BaseModel):
    """How one speculator is made."""

    model_config = ConfigDict(frozen=True)
    recipe: dict[str, Any]
    objective: dict[str, Any]
    on_library: Pass | None = None
    """Over the library's own text, first."""
    on_policy: Pass
    """Over what the verifier itself goes on to write: that is what the draft will see."""
    num_answers: int = NUM_ANSWERS


AUX = {"aux_layer_ids": (2, 16, 29), "intermediate_size": 512}
PLANS = {
    "eagle3": Plan(
        recipe=AUX,
        objective={"ttt_steps": 3},
        on_library=Pass(num_epochs=0.8, learning_rate=3e-3, rows_per_step=2),
        on_policy=Pass(num_epochs=2.0, learning_rate=1e-3),
        num_answers=2048,
    ),
    "peagle": Plan(
        recipe={
            **AUX,
            "num_layers": 2,
            "mask_token_id": MASK_TOKEN_ID,
            "speculative_tokens": 4,
        },
        objective={"num_depths": 4, "max_anchors": None},
        on_policy=Pass(num_epochs=3.0, learning_rate=3e-3),
    ),
    "dflash": Plan(
        recipe={**AUX, "num_layers": 3, "mask_token_id": MASK_TOKEN_ID, "block_size": 6},
        objective={"max_anchors": 512, "decay_length": 3.0},
        on_policy=Pass(num_epochs=3.0, learning_rate=3e-3),
    ),
    "mtp": Plan(
        recipe={"speculative_tokens": 6},  # of 3 to 6 the fastest on a CPU, one request at a time
        objective={"num_steps": 3, "targets": "verifier"},
        on_policy=Pass(num_epochs=3.0, learning_rate=3e-3),
    ),
}


def train_speculator(
    name: str,
    train_rows: Dataset,
    eval_rows: Dataset,
    answers: Dataset,
    verifier_path: Path,
    directory: Path,
    work: Path,
) -> list[dict[str, Any]]:
    """Trains a draft by its plan, saves it in bf16 and returns the log.

    The checkpoint names its verifier by the relative folder, so both move together.
    """
    plan = PLANS[name]
    torch.manual_seed(SEED)
    verifier = load_verifier(str(verifier_path), torch.float32)
    model = MODELS.load(name).from_training_args(
        verifier.config,
        verifier=verifier,
        name_or_path=f"../{verifier_path.name}",
        **plan.recipe,
    )
    made = (model.verifier, model.aux_layer_ids, torch.bfloat16)
    held_out = VerifiedDocuments(PackedDocuments(_all_trained(eval_rows), ROW_LENGTH), *made)
    history = []
    if plan.on_library is not None:
        library = PackedDocuments(_all_trained(train_rows), ROW_LENGTH)
        history += _train(model, plan, plan.on_library, library, held_out, work / "library")
    own = PackedDocuments(answers.select(range(plan.num_answers)), ROW_LENGTH)
    verified = VerifiedDocuments(own, *made)
    log = _train(model, plan, plan.on_policy, verified, held_out, work / "on-policy")
    history += [{"pass": "on-policy", **entry} for entry in log]
    model.to("cpu", torch.bfloat16).save_pretrained(directory)
    return history


@torch.no_grad()
def greedy_answers(verifier: PreTrainedModel, rows: Dataset) -> Dataset:
    """Beginnings of rows, each with the verifier's own continuation, which alone is trained on."""
    generator = random.Random(SEED)
    chosen = [generator.randrange(len(rows)) for _ in range(NUM_ANSWERS)]
    starts = [generator.randrange(len(rows[i]["input_ids"]) - PROMPT_LENGTH) for i in chosen]
    prompts = torch.tensor(
        [rows[i]["input_ids"][s : s + PROMPT_LENGTH] for i, s in zip(chosen, starts, strict=True)]
    )
    texts = []
    for batch in prompts.split(ANSWERS_AT_A_TIME):
        output = verifier.generate(
            batch.to(verifier.device),
            attention_mask=torch.ones_like(batch, device=verifier.device),
            max_new_tokens=ANSWER_LENGTH,
            min_new_tokens=ANSWER_LENGTH,
            do_sample=False,
        )
        texts += output.tolist()
    mask = [0] * PROMPT_LENGTH + [1] * ANSWER_LENGTH
    return Dataset.from_dict({"input_ids": texts, "loss_mask": [mask] * len(texts)})


def _train(
    model: SpeculatorModel,
    plan: Plan,
    stretch: Pass,
    rows: torch.utils.data.Dataset,
    held_out: torch.utils.data.Dataset,
    work: Path,
) -> list[dict[str, Any]]:
    train_kwargs, eval_kwargs = model.get_trainer_kwargs(**plan.objective)
    trainer = SpeculatorTrainer(
        model,
        training_arguments(
            work,
            SEED,
            min_lr_rate=0.02,
            num_train_epochs=stretch.num_epochs,
            warmup_steps=50,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=stretch.rows_per_step,
            eval_strategy="steps",
            eval_steps=250,
            logging_steps=50,
        ),
        train_kwargs=train_kwargs,
        eval_kwargs=eval_kwargs,
        train_dataset=rows,
        eval_dataset=held_out,
        optimizers=(MuonAdamW(model, stretch.learning_rate), None),
    )
    trainer.train()
    return trainer.state.log_history


def _all_trained(rows: Dataset) -> Dataset:
    """Every token of the text is one that the draft may have to propose."""
    return rows.add_column("loss_mask", [[1] * len(row) for row in rows["input_ids"]])
