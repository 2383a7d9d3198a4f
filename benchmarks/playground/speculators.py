"""The playground's speculators: trained on the verifier's states over the same text."""

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, TrainingArguments

from speculators_core.model import load_verifier
from speculators_core.models.eagle3 import Eagle3DraftModel
from speculators_core.training.optimizers import MuonAdamW
from speculators_core.training.trainer import PackedDocuments, SpeculatorTrainer

SEED = 0
ROW_LENGTH = 2048
AUX_LAYER_IDS = (2, 16, 29)


class Pass(BaseModel):
    """A stretch of training over some text."""

    model_config = ConfigDict(frozen=True)
    num_epochs: float
    learning_rate: float
    rows_per_step: int


ON_LIBRARY = Pass(num_epochs=0.8, learning_rate=3e-3, rows_per_step=2)
ON_POLICY = Pass(num_epochs=2.0, learning_rate=1e-3, rows_per_step=1)
NUM_ANSWERS, PROMPT_LENGTH, ANSWER_LENGTH, ANSWERS_AT_A_TIME = 2048, 64, 96, 128


def train_eagle3(
    train_rows: Dataset, eval_rows: Dataset, verifier_path: Path, directory: Path, work: Path
) -> list[dict[str, Any]]:
    """Trains an EAGLE-3 draft, saves it in bf16 and returns the log.

    First on the library's own text, then on what the verifier itself goes on to write after pieces
    of it: that is what the draft will see. The checkpoint names its verifier by the relative
    folder, so both move together.
    """
    torch.manual_seed(SEED)
    verifier = load_verifier(str(verifier_path), torch.float32)
    model = Eagle3DraftModel.from_training_args(
        verifier.config,
        verifier=verifier,
        name_or_path=f"../{verifier_path.name}",
        aux_layer_ids=AUX_LAYER_IDS,
        intermediate_size=512,
    )
    held_out = _all_trained(eval_rows)
    history = _train(model, _all_trained(train_rows), held_out, ON_LIBRARY, work / "library")
    history += continue_on_policy(model, train_rows, eval_rows, work)
    model.to("cpu", torch.bfloat16).save_pretrained(directory)
    return history


def continue_on_policy(
    model: Eagle3DraftModel, train_rows: Dataset, eval_rows: Dataset, work: Path
) -> list[dict[str, Any]]:
    """Trains a draft further on the verifier's own greedy answers and returns the log."""
    answers = greedy_answers(model.verifier, train_rows)
    history = _train(model, answers, _all_trained(eval_rows), ON_POLICY, work / "on-policy")
    return [{"pass": "on-policy", **entry} for entry in history]


@torch.no_grad()
def greedy_answers(verifier: PreTrainedModel, rows: Dataset) -> Dataset:
    """Beginnings of rows, each with the verifier's own continuation, which alone is trained on."""
    generator = random.Random(SEED)
    chosen = generator.sample(range(len(rows)), NUM_ANSWERS)
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
    model: Eagle3DraftModel, documents: Dataset, held_out: Dataset, stretch: Pass, work: Path
) -> list[dict[str, Any]]:
    train_kwargs, eval_kwargs = model.get_trainer_kwargs(ttt_steps=3)
    trainer = SpeculatorTrainer(
        model,
        TrainingArguments(
            output_dir=str(work),
            num_train_epochs=stretch.num_epochs,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.02},
            warmup_steps=50,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=stretch.rows_per_step,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            eval_strategy="steps",
            eval_steps=250,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            seed=SEED,
        ),
        train_kwargs=train_kwargs,
        eval_kwargs=eval_kwargs,
        train_dataset=PackedDocuments(documents, ROW_LENGTH),
        eval_dataset=PackedDocuments(held_out, ROW_LENGTH),
        optimizers=(MuonAdamW(model, stretch.learning_rate), None),
    )
    trainer.train()
    return trainer.state.log_history


def _all_trained(rows: Dataset) -> Dataset:
    """Every token of the text is one that the draft may have to propose."""
    return rows.add_column("loss_mask", [[1] * len(row) for row in rows["input_ids"]])
