"""`transformers.Trainer` for drafts whose verifier runs in the same process."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from speculators_core.batch import Batch
from speculators_core.errors import SpeculatorError
from speculators_core.model import SpeculatorModel
from speculators_core.training.batches import PackedTokens, fill_rows, pack
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

    The model must have its verifier attached in full. ``train_kwargs`` and ``eval_kwargs`` are what
    `SpeculatorModel.get_trainer_kwargs` gives: they go to the model's ``forward``.
    """

    def __init__(
        self,
        model: SpeculatorModel,
        args: TrainingArguments,
        *,
        train_kwargs: Mapping[str, Any],
        eval_kwargs: Mapping[str, Any],
        **kwargs: Any,  # Trainer's own, passed on as they are
    ):
        SpeculatorModel.verify_training_compatible(model)
        if args.train_batch_size != 1 or args.eval_batch_size != 1:
            raise SpeculatorError(
                f"batch sizes {args.train_batch_size} and {args.eval_batch_size}, expected 1: a "
                "batch is one packed row. Several GPUs take one process each (torchrun)."
            )
        super().__init__(model, args, data_collator=_only, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss weighs batches; Trainer must not
        self.train_kwargs = train_kwargs
        self.eval_kwargs = eval_kwargs
        self._metrics: dict[bool, dict[str, list[float]]] = {
            is_training: defaultdict(list) for is_training in (True, False)
        }
        model.verifier.to(self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Trained tokens of one optimizer step: over its batches, and over all ranks."""
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
        speculator = self.accelerator.unwrap_model(model)
        batch = (
            Batch(**inputs).to(dtype=speculator.dtype)
            if "hidden_states" in inputs
            else run_verifier(
                speculator.verifier,
                PackedTokens(**inputs),
                speculator.aux_layer_ids,
                speculator.dtype,
            )
        )
        kwargs = self.train_kwargs if model.training else self.eval_kwargs
        _, loss, metrics = model(batch, **kwargs)
        for name, value in metrics.items():
            self._metrics[model.training][name].append(float(value))
        if num_items_in_batch is not None:
            share = batch.loss_mask.sum() / num_items_in_batch.clamp_min(1)
            loss = loss * share * self.args.world_size
        return (loss, metrics) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the algorithm's metrics, averaged over the batches since the last such line."""
        is_training = not any(key.startswith("eval_") for key in logs)
        prefix = "" if is_training else "eval_"
        metrics = self._metrics[is_training]
        logs |= {f"{prefix}{name}": sum(v) / len(v) for name, v in metrics.items()}
        metrics.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The checkpoint alone: Trainer would add its arguments as a pickle."""
        self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


def _only(rows: list[PackedTokens] | list[Batch]) -> dict[str, Tensor]:
    (row,) = rows
    return dict(vars(row))
