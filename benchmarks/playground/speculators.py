"""The playground's speculators: trained on the verifier's states over the same text."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

from speculators_core.model import load_verifier
from speculators_core.models.eagle3 import Eagle3DraftModel
from speculators_core.training.optimizers import MuonAdamW
from speculators_core.training.trainer import PackedDocuments, SpeculatorTrainer

SEED = 0
ROW_LENGTH = 2048
ROWS_PER_STEP = 2
NUM_EPOCHS = 0.8
LEARNING_RATE = 3e-3
AUX_LAYER_IDS = (2, 16, 29)


def train_eagle3(
    train_rows: Dataset, eval_rows: Dataset, verifier_path: Path, directory: Path, work: Path
) -> list[dict[str, Any]]:
    """Trains an EAGLE-3 draft, saves it in bf16 and returns the log.

    The checkpoint names its verifier by the relative folder, so both move together.
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
    train_kwargs, eval_kwargs = model.get_trainer_kwargs(ttt_steps=3)
    trainer = SpeculatorTrainer(
        model,
        TrainingArguments(
            output_dir=str(work / "eagle3"),
            num_train_epochs=NUM_EPOCHS,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.02},
            warmup_steps=50,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=ROWS_PER_STEP,
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
        train_dataset=PackedDocuments(_all_trained(train_rows), ROW_LENGTH),
        eval_dataset=PackedDocuments(_all_trained(eval_rows), ROW_LENGTH),
        optimizers=(MuonAdamW(model, LEARNING_RATE), None),
    )
    trainer.train()
    model.to("cpu", torch.bfloat16).save_pretrained(directory)
    return trainer.state.log_history


def _all_trained(rows: Dataset) -> Dataset:
    """Every token of the text is one that the draft may have to propose."""
    return rows.add_column("loss_mask", [[1] * len(row) for row in rows["input_ids"]])
