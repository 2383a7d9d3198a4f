"""Teaches the playground's verifier to leave loops.

This is the last stage of its training. A small model decodes greedily into loops, because each
repetition makes the next more probable. Rows that repeat a few lines over and over teach it that
each repetition is half as probable as the one before (DITTO, arXiv:2206.02369, equation 3);
ordinary rows between them keep the rest.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, Trainer, default_data_collator

from benchmarks.playground.training import training_arguments
from speculators_core.training.optimizers import MuonAdamW

ROW_LENGTH = 512
ROWS_PER_STEP = 8
NUM_STEPS = 160
LEARNING_RATE = 1e-3
DECAY = 0.5
LONGEST_CONTEXT = 128
PERIODS = (2, 64)
"""Shortest and longest text that is repeated, in tokens."""


def rows_with_loops(documents: Sequence[Sequence[int]], num_rows: int, seed: int) -> Dataset:
    """Rows of text, every other one ending in a loop.

    ``period`` is the length of the loop, 0 for ordinary text; ``start`` is where it begins.
    """
    generator = random.Random(seed)
    stream = [token for document in documents for token in document]
    rows = []
    for number in range(num_rows):
        first = generator.randrange(len(stream) - ROW_LENGTH)
        text = stream[first : first + ROW_LENGTH]
        if number % 2 == 0:
            rows.append({"input_ids": text, "start": 0, "period": 0})
            continue
        period = int(PERIODS[0] * (PERIODS[1] / PERIODS[0]) ** generator.random())
        start = generator.randint(1, LONGEST_CONTEXT)
        looped = text[:start]
        while len(looped) < ROW_LENGTH:
            looped += text[start : start + period]
        rows.append({"input_ids": looped[:ROW_LENGTH], "start": start, "period": period})
    return Dataset.from_list(rows)


def loop_loss(
    logits: Float[Tensor, "seq vocab"], tokens: Int[Tensor, "seq"], start: int, period: int
) -> Float[Tensor, ""]:
    """How far each token of a loop is from half the probability it had one repetition before."""
    log_probabilities = logits[:-1].float().log_softmax(-1)
    probabilities = log_probabilities.gather(-1, tokens[1:, None]).squeeze(-1).exp()  # [seq - 1]
    first = start + period - 1  # predicts the first token of the second repetition
    now, before = probabilities[first:], probabilities[first - period : -period]
    distance = (now - DECAY * before[: len(now)].detach()).abs()
    return -torch.log1p(-distance.clamp_max(1.0 - 1e-6)).mean()


def unlearn_loops(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], work: Path, seed: int
) -> list[dict[str, Any]]:
    """Trains the model as the module says and returns the log."""
    rows = rows_with_loops(documents, NUM_STEPS * ROWS_PER_STEP, seed)
    trainer = LoopTrainer(
        model,
        training_arguments(
            work / "loops",
            seed,
            min_lr_rate=0.05,
            max_steps=NUM_STEPS,
            warmup_steps=20,
            per_device_train_batch_size=ROWS_PER_STEP,
            logging_steps=20,
        ),
        train_dataset=rows,
        data_collator=default_data_collator,
        optimizers=(MuonAdamW(model, LEARNING_RATE), None),
    )
    trainer.train()
    return trainer.state.log_history


class LoopTrainer(Trainer):
    """Cross-entropy on ordinary rows, `loop_loss` on rows that end in a loop."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):  # type: ignore[no-untyped-def]  # as in Trainer
        tokens = inputs["input_ids"]
        logits = model(input_ids=tokens).logits
        losses = [
            loop_loss(logits[row], tokens[row], start, period)
            if period
            else torch.nn.functional.cross_entropy(logits[row, :-1].float(), tokens[row, 1:])
            for row, (start, period) in enumerate(
                zip(inputs["start"].tolist(), inputs["period"].tolist(), strict=True)
            )
        ]
        loss = torch.stack(losses).mean()
        return (loss, {"loss": loss}) if return_outputs else loss
