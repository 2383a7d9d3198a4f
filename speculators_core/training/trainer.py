"""`transformers.Trainer` for drafts: its loop, with our loss, evaluation and saved states."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from speculators_core.batch import Batch
from speculators_core.errors import SpeculatorError
from speculators_core.model import SpeculatorModel
from speculators_core.training import state as saved
from speculators_core.training.batches import PackedTokens, fill_rows, pack
from speculators_core.training.evaluation import name_teacher_forced
from speculators_core.training.faults import describe_fault
from speculators_core.training.metrics import WeightedMeans
from speculators_core.training.sharding import gather_draft, is_sharded
from speculators_core.training.state_folder import rotate_states
from speculators_core.training.watch import Interrupted
from speculators_core.verifier import LayerTaps


class PackedDocuments(torch.utils.data.Dataset):
    """Documents in rows of equal length, for a `DataLoader` with batch size 1."""

    def __init__(self, documents: Dataset, row_length: int):
        self.documents = documents
        self.row_length = row_length
        self.rows = list(fill_rows(map(len, documents["input_ids"]), row_length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PackedTokens:
        return pack([self.documents[i] for i in self.rows[index]], self.row_length)


def run_verifier(
    verifier: PreTrainedModel,
    tokens: PackedTokens,
    aux_layer_ids: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Batch:
    """The states of every token, each document seen alone; in ``dtype`` where one is given.

    Documents of like lengths are run one beside the other: what stands behind a document's end
    changes nothing in it, and no token is masked from all others' sight. Those of unlike lengths
    stay in their row, where Transformers keeps them apart by the restarts of ``position_ids``.
    """
    last = verifier.config.get_text_config().num_hidden_layers
    device = verifier.device
    rows = _side_by_side(tokens)
    packed = {} if rows is not None else {"position_ids": tokens.position_ids.to(device)}
    input_ids = tokens.input_ids if rows is None else tokens.input_ids[0, rows]
    with torch.no_grad(), LayerTaps(verifier, [*aux_layer_ids, last]) as taps:
        verifier.get_decoder()(input_ids=input_ids.to(device), use_cache=False, **packed)
    last_states = taps.states([last])
    states = taps.states(aux_layer_ids)
    if rows is not None:
        is_filling = torch.zeros_like(rows, dtype=torch.bool)
        is_filling[:, 1:] = rows[:, 1:] == rows[:, :-1]
        kept = (~is_filling).to(device)
        states, last_states = states[kept][None], last_states[kept][None]
    return tokens.with_states(states.to(dtype=dtype), last_states.to(dtype=dtype))


MAX_FILLING = 1.25
"""Documents are run side by side where that is at most this many times the row's tokens."""


def _side_by_side(tokens: PackedTokens) -> Int[Tensor, "documents longest"] | None:
    """The rows of each document, its last one repeated to the length of the longest.

    documents [0 0 0 1 1]  ->  [[0 1 2] [3 4 4]]
    None where there is one document, or where the filling would cost too much.
    """
    documents = tokens.document_ids[0]
    lengths = documents.unique_consecutive(return_counts=True)[1]
    longest = int(lengths.max())
    if len(lengths) == 1 or len(lengths) * longest > MAX_FILLING * len(documents):
        return None
    starts = lengths.cumsum(0) - lengths
    offsets = torch.arange(longest, device=documents.device)
    return starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)


class VerifiedDocuments(torch.utils.data.Dataset):
    """Packed rows with the verifier's states, made once and held in main memory in ``dtype``."""

    def __init__(
        self,
        rows: PackedDocuments,
        verifier: PreTrainedModel,
        aux_layer_ids: Sequence[int],
        dtype: torch.dtype | None = None,
    ):
        packed = (rows[index] for index in range(len(rows)))
        self.batches = [
            run_verifier(verifier, tokens, aux_layer_ids, dtype).to(device="cpu")
            for tokens in packed
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


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
        self._means = WeightedMeans()
        self._step_batches: list[dict[str, Any]] = []
        self._step_losses: list[Tensor] = []
        model.move_verifier(self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        """A stream is each process's own; rows with numbers are split over the processes."""
        if isinstance(self.train_dataset, IterableDataset):
            return DataLoader(self.train_dataset, batch_size=1, collate_fn=_only)
        return super().get_train_dataloader()

    # ---- the loss ----

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Trained tokens of one optimizer step: over its batches, and over all ranks."""
        self._step_batches, self._step_losses = batch_samples, []
        if not batch_samples:  # a stream has ended
            return torch.zeros((), device=device)
        count = torch.stack([batch["loss_mask"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

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
        num_trained = batch.loss_mask.sum()
        self._means.add(name_teacher_forced(metrics), num_trained)
        self._step_losses.append(loss.detach())
        if num_items_in_batch is not None:
            share = num_trained / num_items_in_batch.clamp_min(1)
            loss = loss * share * self.args.world_size
        return (loss, metrics) if return_outputs else loss

    def _batch(self, inputs: Mapping[str, Any]) -> Batch:
        tensors = {name: tensor for name, tensor in inputs.items() if name != "row"}
        dtype = torch.bfloat16 if self.args.bf16 else self.speculator.dtype
        if "hidden_states" in tensors:
            return Batch(**tensors).to(dtype=dtype)
        draft = self.speculator
        return run_verifier(draft.verifier, PackedTokens(**tensors), draft.aux_layer_ids, dtype)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Raises SpeculatorError where a gradient is not finite, and says of which batch."""
        found = super()._get_grad_norm(model, grad_norm)
        norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
        if not math.isfinite(norm):
            keys_of = getattr(self.train_dataset, "keys_of", _no_keys)
            step = self.state.global_step + 1
            raise SpeculatorError(
                describe_fault(step, norm, self._step_batches, self._step_losses, keys_of)
            )
        return norm

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Losses and teacher-forced figures over held-out rows, and what ``measure`` finds.

        Rows are split over the ranks; each has as many passes, those too many without weight.
        Random generators go on as if there had been none. Where it is interrupted the run is saved
        and stopped, and goes on with it.
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
        for first in range(0, len(rows), world):
            number = first + rank
            batch = self._batch(self._prepare_inputs(_only([rows[min(number, len(rows) - 1)]])))
            with self.compute_loss_context_manager():
                _, loss, metrics = model(batch, **self.eval_kwargs)
            weight = batch.loss_mask.sum() * (number < len(rows))
            means.add({"loss": loss, **name_teacher_forced(metrics)}, weight)
        return means.take()

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
        """Adds the teacher-forced figures, averaged over the tokens since the last such line.

        Of the summary at the end only the times stay: its loss is of this process's steps alone.
        """
        if "loss" in logs:
            logs |= self._means.take()
        for name in ("train_loss", "total_flos"):
            logs.pop(name, None)
        super().log(logs, start_time)

    # ---- saved states ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, step = Path(self.args.output_dir), self.state.global_step
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


def _no_keys(row: int) -> list[str]:
    return []


def _only(rows: Sequence[Any]) -> dict[str, Tensor]:
    """A row as it is: a batch has one."""
    (row,) = rows
    return row if isinstance(row, dict) else dict(vars(row))
