"""Transformers' Trainer with our loss, evaluation and states."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from speculators_core.batch import PADDING, Batch
from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.training.evaluation import name_teacher_forced
from speculators_core.training.faults import describe_no_fault, find_fault
from speculators_core.training.metrics import WeightedMeans
from speculators_core.training.rows.sources import PackedRow, Rows, Stream
from speculators_core.training.sharding import gather_draft, is_sharded
from speculators_core.training.states import state as saved
from speculators_core.training.states.state_folder import rotate_states
from speculators_core.training.stop import Interrupted
from speculators_core.training.trainer_points import check_trainer
from speculators_core.training.zero import is_zero

REPEATED = "repeated"
"""Key that marks a batch which another rank trains on too."""


class SpeculatorTrainer(Trainer):
    """Trains a speculator with the loss of its algorithm.

    Batches are weighted by the tokens that they train, over accumulation steps and ranks. A
    gradient that is not finite ends the run before any weight changes.
    """

    control: TrainerControl

    def __init__(
        self,
        model: SpeculatorModel,
        args: TrainingArguments,
        *,
        train_kwargs: Mapping[str, object],
        eval_kwargs: Mapping[str, object],
        train_dataset: Rows | Stream,
        eval_dataset: Sequence[Batch],
        optimizer: Optimizer,
        measure: Callable[[SpeculatorModel], dict[str, float]] | None = None,
        keep: int = 1,
    ):
        """``train_kwargs`` and ``eval_kwargs`` are what `SpeculatorModel.get_trainer_kwargs`
        returns; they are passed to the model's ``forward``.

        ``measure`` returns further figures at each evaluation, of a draft that is whole on each
        rank; its ``acceptance_length`` decides which state is the best. ``keep``: saved states to
        keep, beside the best.

        Raises:
            SpeculatorError: the draft cannot be trained as it is, or the installed Transformers
                lacks what training needs.
        """
        SpeculatorModel.verify_training_compatible(model)
        if args.train_batch_size != 1 or args.eval_batch_size != 1:
            raise SpeculatorError(
                f"batch sizes {args.train_batch_size} and {args.eval_batch_size}, expected 1: a "
                "batch is one packed row. Start one process for each GPU with torchrun."
            )
        check_trainer(is_sharded(model) or args.deepspeed is not None)
        super().__init__(
            model,
            args,
            data_collator=_only,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            optimizers=(optimizer, None),
        )
        self._given_optimizer = optimizer
        self.remove_callback(PrinterCallback)
        if is_sharded(model):
            # Transformers then leaves placement and the sum of gradients to the model's shards.
            self.is_distributed_loading_by_transformers = True
        self.model_accepts_loss_kwargs = True  # compute_loss weights batches; Trainer must not
        self.speculator = model
        self.train_kwargs = train_kwargs
        self.eval_kwargs = eval_kwargs
        self.measure = measure
        self.keep = keep
        self.was_interrupted = False
        """Whether a signal interrupted the run while it waited for a row."""
        self._saved_step = 0
        """Step of the newest state; before the first step there is nothing to save."""
        self._means = WeightedMeans()
        self._step_batches: list[PackedRow] = []
        self._step_losses: list[Tensor] = []
        if model.attached is not None:
            model.attached.move(self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        """Each process has a stream for itself; numbered rows are split over the processes."""
        if isinstance(self.train_dataset, IterableDataset):
            return DataLoader(self.train_dataset, batch_size=1, collate_fn=_only)
        return super().get_train_dataloader()

    def _run_epoch(self, **kwargs: object) -> None:
        """Does nothing where the run is over, since Trainer takes a step before it looks.

        Stops the run when no more rows come, and saves it if it was interrupted.
        """
        if self.control.should_training_stop:
            return
        try:
            super()._run_epoch(**kwargs)
        except _OutOfRows:
            self.control.should_training_stop = True
        except Interrupted:
            self.was_interrupted = True
            self.control.should_log = self.control.should_training_stop = True
            self.control.should_save = self._saved_step != self.state.global_step
            names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
            self._maybe_log_save_evaluate(self._tr_loss, None, *(kwargs[name] for name in names))

    # ---- the loss ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[PackedRow], num_batches: int, device: torch.device
    ) -> tuple[list[PackedRow], Tensor]:
        """The batches of one optimizer step, and how many tokens they train over all ranks.

        Their tokens without padding are added to the state's. An epoch ends at the same step on all
        ranks: a rank that lacks a row for it repeats one, which has no weight.

        Raises:
            Interrupted: a rank was interrupted while it waited for a row; all ranks raise it.
            _OutOfRows: a rank has no row; all ranks raise it.
        """
        batches: list[PackedRow] = []
        is_interrupted = False
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except Interrupted:
            is_interrupted = True
        if batches and self._ends_with_repeat():
            batches[-1] = {**batches[-1], REPEATED: torch.tensor(True)}
        ends = torch.tensor([not batches, is_interrupted], device=device)
        counts = self._gathered(torch.cat([_count_tokens(batches, device), ends]))
        num_trained, num_real, num_without, num_interrupted = counts.sum(0)
        if num_interrupted:
            raise Interrupted
        if num_without:
            raise _OutOfRows
        self._step_batches, self._step_losses = batches, []
        self.state.num_input_tokens_seen += int(num_real)
        return batches, num_trained

    def _gathered(self, counts: Tensor) -> Tensor:
        """The counts of all ranks, one row each."""
        rows = counts[None]
        return self.accelerator.gather(rows) if self.args.world_size > 1 else rows

    def _ends_with_repeat(self) -> bool:
        """Whether accelerate repeats the last row that this rank got."""
        if not self.accelerator.gradient_state.end_of_dataloader:
            return False
        remainder = len(self.train_dataset) % self.args.world_size
        return 0 < remainder <= self.args.process_index

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedRow,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The batch's loss; in an optimizer step, its share by trained tokens.

        Batches of few tokens count little, on whatever rank they are. The gradients of the ranks
        are averaged afterwards, hence the number of ranks as a factor.
        """
        batch = self._batch(inputs)
        kwargs = self.train_kwargs if model.training else self.eval_kwargs
        _, loss, metrics = model(batch, **kwargs)
        num_trained = _num_trained(inputs)
        self._means.add(name_teacher_forced(metrics), num_trained)
        self._step_losses.append(loss.detach())
        if num_items_in_batch is not None:
            share = num_trained / num_items_in_batch.clamp_min(1)
            loss = loss * share * self.args.world_size
        return (loss, metrics) if return_outputs else loss

    @property
    def _dtype(self) -> torch.dtype:
        """Type of the states that the draft reads."""
        return torch.bfloat16 if self.args.bf16 else self.speculator.dtype

    def _batch(self, inputs: PackedRow) -> Batch:
        tensors = {name: t for name, t in inputs.items() if name not in ("row", REPEATED)}
        return Batch(**tensors).to(dtype=self._dtype)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | Tensor | None = None) -> float:
        """Raises SpeculatorError, which names the batch, where a gradient is not finite."""
        found = super()._get_grad_norm(model, grad_norm)
        norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
        if not math.isfinite(norm):
            self._raise_fault(norm)
        return norm

    def _raise_fault(self, norm: float) -> None:
        """All ranks call it; those that have no fault themselves name the ranks that have one."""
        keys_of = self.train_dataset.keys_of
        fault = find_fault(self._step_batches, self._step_losses, keys_of)
        has_fault = torch.tensor(int(fault is not None), device=self.args.device)
        ranks = self._gathered(has_fault).nonzero().flatten().tolist()
        others = describe_no_fault(norm, ranks, self._step_batches, keys_of)
        raise SpeculatorError(f"step {self.state.global_step + 1}: {fault or others}")

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Sequence[Batch] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Losses and teacher-forced figures over held-out rows, and the figures of ``measure``.

        Rows are split over the ranks; of a stream each rank has different ones. All ranks make the
        same number of passes, surplus ones without weight. Random generators are left unchanged.
        An evaluation that is interrupted is made up for when the run, saved and stopped here, is
        resumed.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        start, model = time.monotonic(), self.model_wrapped
        was_training = model.training
        model.eval()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed)  # a draft that draws its rows draws the same ones
            found = self._evaluate_rows(model, rows)
            try:
                found |= {} if self.measure is None else self.measure(self.whole_draft())
            except Interrupted:
                self.control.should_evaluate = False
                self.control.should_save = self.control.should_training_stop = True
                return {}
            finally:
                model.train(was_training)
        found["runtime"] = time.monotonic() - start
        self._note_best(found)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _evaluate_rows(self, model: nn.Module, rows: Sequence[Batch]) -> dict[str, float]:
        means, world, rank = WeightedMeans(), self.args.world_size, self.args.process_index
        is_own = isinstance(self.train_dataset, IterableDataset)
        numbers = range(len(rows)) if is_own else range(rank, len(rows), world)
        for turn in range(self._most_turns(len(numbers), has_rows=len(rows) > 0)):
            number = numbers[turn] if turn < len(numbers) else len(rows) - 1
            batch = rows[number].to(self._dtype, self.args.device)
            with self.accelerator.autocast():
                _, loss, metrics = model(batch, **self.eval_kwargs)
            weight = batch.loss_mask.sum() * (turn < len(numbers))
            means.add({"loss": loss, **name_teacher_forced(metrics)}, weight)
        return means.take()

    def _most_turns(self, turns: int, has_rows: bool) -> int:
        """The most that a rank has; none where a rank has no row to take part with."""
        counts = self._gathered(torch.tensor([turns, not has_rows], device=self.args.device))
        most, num_without = counts[:, 0].max(), counts[:, 1].sum()
        return 0 if num_without else int(most)

    def _note_best(self, found: Mapping[str, float]) -> None:
        """The longer acceptance length is better; of equal ones, that with the lower loss."""
        if "acceptance_length" not in found:
            return
        score = [found["acceptance_length"], -found.get("loss", 0.0)]
        if self.state.best_metric is None or score > self.state.best_metric:
            self.state.best_metric = score
            self.state.best_global_step = self.state.global_step
            self.control.should_save = self.is_in_train

    def whole_draft(self) -> SpeculatorModel:
        """The draft with its present weights, whole on each rank, with its verifier.

        Every rank calls it.
        """
        is_whole = not (is_sharded(self.speculator) or is_zero(self.speculator))
        return self.speculator if is_whole else gather_draft(self.speculator)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the tokens so far, and to a loss the teacher-forced figures since the last one.

        Only the times of the summary at the end are kept: its loss covers this process alone.
        """
        if "loss" in logs:
            logs |= self._means.take()
        for name in ("train_loss", "total_flos"):
            logs.pop(name, None)
        logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    # ---- saved states ----

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        run, step = Path(self.args.output_dir), self.state.global_step
        self._saved_step = step
        saved.write_state(
            run / f"{PREFIX_CHECKPOINT_DIR}-{step}",
            model=self.speculator,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            trainer_state=json.dumps(dataclasses.asdict(self.state), indent=1),
            is_writer=self.args.should_save,
        )
        if self.args.should_save:
            rotate_states(run, self.keep, self.state.best_global_step)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer that was given; Transformers forgets it when DeepSpeed starts."""
        self.optimizer = self._given_optimizer
        return self._given_optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """DeepSpeed shards the weights when it starts: a saved state's are read before."""
        if self.args.deepspeed is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        if resume_from_checkpoint is not None:
            saved.read_weights(Path(resume_from_checkpoint), self.speculator)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Weights are read together with the optimizer, when it exists."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._saved_step = self.state.global_step
            saved.read_state(
                Path(checkpoint),
                model=self.speculator,
                optimizer=self.optimizer,
                scheduler=self.lr_scheduler,
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saved.restore_rng(Path(checkpoint), self.args.process_index, self.args.world_size)

    def _save(
        self, output_dir: str | Path | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Saves the checkpoint alone: Trainer would add its arguments as a pickle."""
        self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def floating_point_ops(self, inputs: PackedRow) -> int:
        return 0


class _OutOfRows(Exception):
    """A stream has ended."""


def _count_tokens(
    batches: Sequence[PackedRow], device: torch.device
) -> Int64[Tensor, "trained_and_all"]:
    """Tokens that are trained, and all without padding; repeated rows are left out."""
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for batch in batches:
        if REPEATED not in batch:
            is_real = batch["document_ids"] != PADDING
            counts += torch.stack([batch["loss_mask"].sum(), is_real.sum()]).to(device)
    return counts


def _num_trained(inputs: PackedRow) -> Tensor:
    """Tokens of a batch that count in its step."""
    return inputs["loss_mask"].sum() * (REPEATED not in inputs)


def _only(rows: Sequence[PackedRow]) -> PackedRow:
    """The batch of one row."""
    (row,) = rows
    return row
