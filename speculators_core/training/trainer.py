"""`transformers.Trainer` for drafts: its loop, with our loss, evaluation and saved states."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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
from speculators_core.training.sharding import gather_draft, is_sharded
from speculators_core.training.states import state as saved
from speculators_core.training.states.state_folder import rotate_states
from speculators_core.training.watch import Interrupted

REPEATS = "repeats"
"""Key of a batch that another rank has too."""


class SpeculatorTrainer(Trainer):
    """Trains a speculator; the loss is the algorithm's own.

    Batches count by the tokens that they train, over accumulation steps and ranks. A gradient that
    is not finite ends the run before it reaches a weight.
    """

    control: TrainerControl

    def __init__(
        self,
        model: SpeculatorModel,
        args: TrainingArguments,
        *,
        train_kwargs: Mapping[str, Any],
        eval_kwargs: Mapping[str, Any],
        measure: Callable[[SpeculatorModel], dict[str, float]] | None = None,
        keep: int = 1,
        **kwargs: Any,  # Trainer's own, passed on as they are
    ):
        """``train_kwargs`` and ``eval_kwargs`` are what `SpeculatorModel.get_trainer_kwargs` gives:
        they go to the model's ``forward``.

        ``measure`` gives more figures at each evaluation, of a draft that is whole on each rank;
        ``acceptance_length`` among them tells the best state. ``keep``: saved states, beside it.
        """
        SpeculatorModel.verify_training_compatible(model)
        if args.train_batch_size != 1 or args.eval_batch_size != 1:
            raise SpeculatorError(
                f"batch sizes {args.train_batch_size} and {args.eval_batch_size}, expected 1: a "
                "batch is one packed row. Several GPUs take one process each (torchrun)."
            )
        super().__init__(model, args, data_collator=_only, **kwargs)
        self.remove_callback(PrinterCallback)
        # Transformers then leaves placement and the sum of gradients to the model's own shards.
        self.is_distributed_loading_by_transformers |= is_sharded(model)
        self.model_accepts_loss_kwargs = True  # compute_loss weighs batches; Trainer must not
        self.speculator = model
        self.train_kwargs = train_kwargs
        self.eval_kwargs = eval_kwargs
        self.measure = measure
        self.keep = keep
        self.was_interrupted = False
        """While it waited for a row."""
        self._saved_step = 0
        """Of the newest state; before the first step there is nothing to save."""
        self._means = WeightedMeans()
        self._step_batches: list[dict[str, Any]] = []
        self._step_losses: list[Tensor] = []
        model.move_verifier(self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        """A stream is each process's own; rows with numbers are split over the processes."""
        if isinstance(self.train_dataset, IterableDataset):
            return DataLoader(self.train_dataset, batch_size=1, collate_fn=_only)
        return super().get_train_dataloader()

    def _run_epoch(self, **kwargs: Any) -> None:  # Trainer's own
        """Nothing where the run is over: Trainer takes a step before it looks.

        Where a row does not come any more the run is stopped, and saved if it was interrupted.
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
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The batches of one optimizer step, and how many tokens they train over all ranks.

        All their tokens but padding are added to the state's. An epoch ends at the same step on all
        ranks: who lacks a row for that repeats one, which counts for nothing.

        Raises:
            Interrupted: a rank was, while it waited for a row; all raise it.
            _OutOfRows: a rank has no row; all raise it.
        """
        batches: list[dict[str, Any]] = []
        is_interrupted = False
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except Interrupted:
            is_interrupted = True
        if batches and self._ends_with_repeat():
            batches[-1] = {**batches[-1], REPEATS: True}
        ends = torch.tensor([not batches, is_interrupted], device=device)
        told = torch.cat([_count_tokens(batches, device), ends])[None]
        if self.args.world_size > 1:
            told = self.accelerator.gather(told)
        num_trained, num_real, num_without, num_interrupted = told.sum(0)
        if num_interrupted:
            raise Interrupted
        if num_without:
            raise _OutOfRows
        self._step_batches, self._step_losses = batches, []
        self.state.num_input_tokens_seen += int(num_real)
        return batches, num_trained

    def _ends_with_repeat(self) -> bool:
        """Whether accelerate repeats the last row that was given to this rank."""
        if not self.accelerator.gradient_state.end_of_dataloader:
            return False
        remainder = len(self.train_dataset) % self.args.world_size
        return 0 < remainder <= self.args.process_index

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The batch's loss; in an optimizer step, its share by trained tokens.

        Batches of few tokens count little, on whatever rank they are; the ranks' gradients are
        averaged afterwards, hence their number as a factor.
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

    def _batch(self, inputs: Mapping[str, Any]) -> Batch:
        tensors = {name: t for name, t in inputs.items() if name not in ("row", REPEATS)}
        dtype = torch.bfloat16 if self.args.bf16 else self.speculator.dtype
        return Batch(**tensors).to(dtype=dtype)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Raises SpeculatorError where a gradient is not finite, and says of which batch."""
        found = super()._get_grad_norm(model, grad_norm)
        norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
        if not math.isfinite(norm):
            self._raise_fault(norm)
        return norm

    def _raise_fault(self, norm: float) -> None:
        """All ranks come here, and those without a fault of their own name the others."""
        keys_of = getattr(self.train_dataset, "keys_of", _no_keys)
        fault = find_fault(self._step_batches, self._step_losses, keys_of)
        has_fault = torch.tensor([int(fault is not None)], device=self.args.device)
        if self.args.world_size > 1:
            has_fault = self.accelerator.gather(has_fault)
        ranks = has_fault.nonzero().flatten().tolist()
        others = describe_no_fault(norm, ranks, self._step_batches, keys_of)
        raise SpeculatorError(f"step {self.state.global_step + 1}: {fault or others}")

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Losses and teacher-forced figures over held-out rows, and what ``measure`` finds.

        Rows are split over the ranks, those of a stream are each rank's own. Each has as many
        passes, those too many without weight. Random generators go on as if there had been none.
        Where it is interrupted the run is saved and stopped, and goes on with it.
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

    def _evaluate_rows(self, model: nn.Module, rows: Any) -> dict[str, float]:
        means, world, rank = WeightedMeans(), self.args.world_size, self.args.process_index
        is_own = isinstance(self.train_dataset, IterableDataset)
        numbers = range(len(rows)) if is_own else range(rank, len(rows), world)
        for turn in range(self._most_turns(len(numbers), has_rows=len(rows) > 0)):
            number = numbers[turn] if turn < len(numbers) else len(rows) - 1
            batch = self._batch(self._prepare_inputs(_only([rows[number]])))
            with self.compute_loss_context_manager():
                _, loss, metrics = model(batch, **self.eval_kwargs)
            weight = batch.loss_mask.sum() * (turn < len(numbers))
            means.add({"loss": loss, **name_teacher_forced(metrics)}, weight)
        return means.take()

    def _most_turns(self, turns: int, has_rows: bool) -> int:
        """Of all ranks; none where a rank has no row to take part with."""
        told = torch.tensor([[turns, not has_rows]], device=self.args.device)
        if self.args.world_size > 1:
            told = self.accelerator.gather(told)
        most, num_without = told[:, 0].max(), told[:, 1].sum()
        return 0 if num_without else int(most)

    def _note_best(self, found: Mapping[str, float]) -> None:
        """A longer acceptance length is better; of equal ones that of the lower loss."""
        if "acceptance_length" not in found:
            return
        score = [found["acceptance_length"], -found.get("loss", 0.0)]
        if self.state.best_metric is None or score > self.state.best_metric:
            self.state.best_metric = score
            self.state.best_global_step = self.state.global_step
            self.control.should_save = self.is_in_train

    def whole_draft(self) -> SpeculatorModel:
        """The draft as it is now, whole on each rank, with its verifier; every rank calls it."""
        return gather_draft(self.speculator) if is_sharded(self.speculator) else self.speculator

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the tokens so far, and to a loss the teacher-forced figures since the last one.

        Of the summary at the end only the times stay: its loss is of this process's steps alone.
        """
        if "loss" in logs:
            logs |= self._means.take()
        for name in ("train_loss", "total_flos"):
            logs.pop(name, None)
        logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    # ---- saved states ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights come with the optimizer, when it has been made."""

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

    def _save(self, output_dir: str | Path | None = None, state_dict: Any = None) -> None:
        """The checkpoint alone: Trainer would add its arguments as a pickle."""
        self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0


class _OutOfRows(Exception):
    """A stream has ended."""


def _count_tokens(
    batches: Sequence[Mapping[str, Any]], device: torch.device
) -> Int64[Tensor, "trained_and_all"]:
    """Those that are trained and all but padding, without rows that repeat."""
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for batch in batches:
        if REPEATS not in batch:
            is_real = batch["document_ids"] != PADDING
            counts += torch.stack([batch["loss_mask"].sum(), is_real.sum()]).to(device)
    return counts


def _num_trained(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens of a batch that count in its step."""
    return inputs["loss_mask"].sum() * (REPEATS not in inputs)


def _no_keys(row: int) -> list[str]:
    return []


def _only(rows: Sequence[Any]) -> dict[str, Tensor]:
    """A row as it is: a batch has one."""
    (row,) = rows
    return row if isinstance(row, dict) else dict(vars(row))
