"""Trainer arguments common to all stages of the playground."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


def training_arguments(
    output: Path, seed: int, min_lr_rate: float, **own: Any
) -> TrainingArguments:
    """bf16, a cosine down to ``min_lr_rate`` of the learning rate, and nothing saved on the way.

    ``own`` are the stretch's own settings, under the names that `TrainingArguments` gives them.
    """
    return TrainingArguments(
        output_dir=str(output),
        seed=seed,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": min_lr_rate},
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        **own,
    )
