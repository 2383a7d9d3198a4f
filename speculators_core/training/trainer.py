"""`transformers.Trainer` for drafts whose verifier runs in the same process."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
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

    Transformers keeps packed documents apart by the restarts of ``position_ids``.
    """
    last = verifier.config.get_text_config().num_hidden_layers
    device = verifier.device
    with torch.no_grad(), LayerTaps(verifier, [*aux_layer_ids, last]) as taps:
        verifier.get_decoder()(
            input_ids=tokens.input_ids.to(device),
            position_ids=tokens.position_ids.to(device),
            use_cache=False,
        )
    return tokens.with_states(
        taps.states(aux_layer_ids).to(dtype=dtype), taps.states([last]).to(dtype=dtype)
    )


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
        self.train_kwargs = train_kwargs
        self.eval_kwargs = eval_kwargs
        self._metrics: dict[bool, dict[str, list[float]]] = {
            is_training: defaultdict(list) for is_training in (True, False)
        }
        model.verifier.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        speculator = self.accelerator.unwrap_model(model)
        tokens = PackedTokens(**inputs)
        batch = run_verifier(
            speculator.verifier, tokens, speculator.config.aux_layer_ids, speculator.dtype
        )
        kwargs = self.train_kwargs if model.training else self.eval_kwargs
        _, loss, metrics = model(batch, **kwargs)
        for name, value in metrics.items():
            self._metrics[model.training][name].append(float(value))
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


def _only(rows: list[PackedTokens]) -> dict[str, Tensor]:
    (row,) = rows
    return dict(vars(row))
