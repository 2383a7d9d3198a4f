"""Memory, disk space and time of a run.

    weights       float32, trained or frozen
    gradients     float32, of trained weights; DDP has a copy of them to send
    optimizer     AdamW keeps two float32 for each weight, Muon one for each weight of its matrices
    activations   tensors of a step, as the allocator holds them: see `rehearsal`
    row           states in the stored type, and in the type of the computation

Evaluation (the verifier's KV cache, a whole copy of a sharded draft) and the verifier's pass over
texts come between steps. They use the memory that the step has freed, and count only beyond it.
"""

import logging
from copy import copy
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from pydantic import Field
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel

from speculators_core.console import console
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.format.checkpoint import as_dtype
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.settings import Settings
from speculators_core.training.budget.free_space import (
    DISK,
    MAIN_MEMORY,
    attached_to,
    available_bytes,
    bytes_of,
)
from speculators_core.training.budget.rehearsal import (
    StepMemory,
    measure_rate,
    states_width,
    step_memory,
)
from speculators_core.training.device import compute_dtype, training_device
from speculators_core.training.evaluation import DECODED_AT_ONCE
from speculators_core.training.optimizers import MuonAdamW
from speculators_core.training.settings import TrainingPlan
from speculators_core.verifier.sizes import layer_sizes, required_size

logger = logging.getLogger(__name__)

FLOAT_BYTES = 4
INDEX_BYTES = 3 * 8 + 1
"""Id, document, position and loss mask of a token of a row."""
PREFETCHED_ROWS = 2
"""Rows that each worker of a `DataLoader` reads ahead."""
LIBRARIES_BYTES = 64 * 2**20
"""Memory that the first step takes for kernels, thread pools and workspaces."""


class Budget(Settings):
    """The memory or disk space that a run needs at one place, and what is available there."""

    place: str
    """A device, main memory or a disk."""
    parts: dict[str, int]
    """Bytes by purpose."""
    available_bytes: int
    """Free bytes, and those that the run uses there already."""
    savings: dict[str, int] = Field(default_factory=dict)
    """Bytes that changes of options would save; empty where the run fits."""

    @property
    def needed_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def is_enough(self) -> bool:
        return self.needed_bytes <= self.available_bytes


class Estimate(Settings):
    """What each process of a run takes."""

    budgets: tuple[Budget, ...]
    trained_parameters: int
    frozen_parameters: int
    num_steps: int
    num_rows: int | None
    """Rows of one pass over the data; None where that is not known."""
    num_tokens: int | None
    """Tokens of one pass without padding; None where that is not known."""
    rate_tokens_per_s: float | None
    """Rate of one process, padding included; None where it was not measured."""
    seconds: float | None
    """Time of all steps, without evaluation and saving."""


def estimate(
    plan: TrainingPlan,
    draft: SpeculatorModel,
    *,
    num_steps: int,
    num_rows: int | None = None,
    num_tokens: int | None = None,
    num_eval_tokens: int | None = None,
    world_size: int = 1,
    verifier_bytes: int | None = None,
    stored_dtype: torch.dtype = torch.float32,
    rate_tokens_per_s: float | None = None,
    is_timed: bool = True,
) -> Estimate:
    """What a run of ``draft`` takes on this machine.

    The draft may be on the meta device; its verifier, or the verifier's head, must be attached.
    ``num_eval_tokens``: tokens of the held-out examples; where None, each counts as a full row.
    ``verifier_bytes``: size of the whole verifier or its head; as attached where None.
    ``stored_dtype``: type of the states in the data. ``rate_tokens_per_s``: where None and
    ``is_timed``, a few steps are timed on the run's device (see `measure_rate`), if the run fits
    and the draft has weights.

    Raises:
        SpeculatorError: no verifier is attached.
    """
    each = float(plan.data.row_length)
    if num_eval_tokens is not None:
        each = num_eval_tokens / max(1, plan.data.eval_examples)
    if verifier_bytes is None:
        verifier_bytes = bytes_of(attached_to(draft))
    device = training_device()
    run = _Run(draft, device, world_size, each, verifier_bytes, stored_dtype)
    budgets = tuple(run.budget(place, parts, plan) for place, parts in run.needs(plan).items())
    fits = all(budget.is_enough for budget in budgets)
    if rate_tokens_per_s is None and is_timed and fits and draft.device.type != "meta":
        rate_tokens_per_s = measure_rate(draft, plan, device)
    row_tokens = num_steps * plan.optimizer.rows_per_step * plan.data.row_length
    return Estimate(
        budgets=budgets,
        trained_parameters=run.num_trained,
        frozen_parameters=sum(w.numel() for w in draft.parameters()) - run.num_trained,
        num_steps=num_steps,
        num_rows=num_rows,
        num_tokens=num_tokens,
        rate_tokens_per_s=rate_tokens_per_s,
        seconds=None if rate_tokens_per_s is None else row_tokens / rate_tokens_per_s,
    )


def refuse(estimate: Estimate) -> None:
    """Raises SpeculatorError where the run does not fit, with the option that would help most."""
    for budget in estimate.budgets:
        if budget.is_enough:
            continue
        most = max(budget.parts, key=lambda part: budget.parts[part])
        advice = "Free some, or use a place that has more."
        if budget.savings:
            option = max(budget.savings, key=lambda name: budget.savings[name])
            advice = f"Set {option}, which saves {_size(budget.savings[option])}."
        raise SpeculatorError(
            f"the run needs {_size(budget.needed_bytes)} of {budget.place}; "
            f"{_size(budget.available_bytes)} are available. {most} takes "
            f"{_size(budget.parts[most])}. {advice}"
        )


def print_estimate(estimate: Estimate) -> None:
    """Prints a table of the budgets, then parameters, data and time."""
    table = Table(title="what the run takes", title_justify="left")
    for column in ("place", "part", "size"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for budget in estimate.budgets:
        parts = [(part, size_bytes) for part, size_bytes in budget.parts.items() if size_bytes]
        for number, (part, size_bytes) in enumerate(parts):
            table.add_row("" if number else budget.place, part, _size(size_bytes))
        table.add_row("", "total", _size(budget.needed_bytes), style="bold")
        table.add_row("", "available", _size(budget.available_bytes), end_section=True)
    trained, frozen = estimate.trained_parameters, estimate.frozen_parameters
    rows, tokens = (
        "unknown" if count is None else f"{count:,}"
        for count in (estimate.num_rows, estimate.num_tokens)
    )
    spent = "not measured"
    if estimate.seconds is not None and estimate.rate_tokens_per_s is not None:
        spent = f"{timedelta(seconds=round(estimate.seconds))} of steps, at "
        spent += f"{estimate.rate_tokens_per_s:,.0f} tokens/s in each process"
    console.print(table)
    for line in (
        f"parameters: {trained:,} trained, {frozen:,} frozen",
        f"tokens: {tokens}, rows: {rows}, steps: {estimate.num_steps:,}",
        f"time: {spent}",
    ):
        console.print(line, highlight=False)


def _size(size_bytes: int) -> str:
    unit, name = (2**30, "GiB") if size_bytes >= 2**30 else (2**20, "MiB")
    return f"{size_bytes / unit:.1f} {name}"


# ---- what is needed ----


@dataclass(frozen=True)
class _Run:
    """A draft and where it trains, for plans that differ in what they need."""

    draft: SpeculatorModel
    device: torch.device
    world_size: int
    eval_tokens_each: float
    verifier_bytes: int
    stored_dtype: torch.dtype
    rehearsed: dict[tuple, StepMemory] = field(default_factory=dict)

    @property
    def num_trained(self) -> int:
        return sum(w.numel() for w in self.draft.parameters() if w.requires_grad)

    def budget(self, place: str, parts: dict[str, int], plan: TrainingPlan) -> Budget:
        available = available_bytes(place, self.draft, plan.run.output)
        found = Budget(place=place, parts=parts, available_bytes=available)
        if found.is_enough:
            return found
        after = {
            option: sum(self.needs(changed)[place].values())
            for option, changed in self._alternatives(plan).items()
        }
        savings = {o: found.needed_bytes - n for o, n in after.items() if n < found.needed_bytes}
        return found.model_copy(update={"savings": savings})

    def needs(self, plan: TrainingPlan) -> dict[str, dict[str, int]]:
        """Bytes by place and part."""
        on_device, beside = self._device_parts(plan), self._main_memory_parts(plan)
        is_one = self.device.type == "cpu"
        memory = {} if is_one else {str(self.device): on_device}
        return {
            **memory,
            MAIN_MEMORY: {**on_device, **beside} if is_one else beside,
            f"{DISK}{plan.run.output}": {
                "saved states": (plan.run.keep + 2) * self._state_bytes(plan),
                "speculator": self._weight_bytes(as_dtype(plan.run.saved_dtype).itemsize),
            },
        }

    def _alternatives(self, plan: TrainingPlan) -> dict[str, TrainingPlan]:
        """Plans that may need less, by the change of an option."""
        data, evaluation = plan.data, plan.evaluation
        shorter = max(16, data.row_length // 2)
        found = {
            f"data.row_length to {shorter}": _with(plan, "data", row_length=shorter),
            "run.dtype to bfloat16": _with(plan, "run", dtype="bfloat16"),
            "run.keep to 1": _with(plan, "run", keep=1),
        }
        for option in ("eval_examples", "queue_size", "num_workers"):
            fewer = getattr(data, option) // 2
            found[f"data.{option} to {fewer}"] = _with(plan, "data", **{option: fewer})
        if self.draft.supports_gradient_checkpointing:
            recomputing = _with(plan, "run", gradient_checkpointing=True)
            found["run.gradient_checkpointing to true"] = recomputing
        if self.world_size > 1:
            found["run.fsdp to true"] = _with(plan, "run", fsdp=True)
        if evaluation.decode and evaluation.patience is None:
            found["evaluation.decode to false"] = _with(plan, "evaluation", decode=False)
        return found

    # ---- counts ----

    def _weight_bytes(self, float_bytes: int = FLOAT_BYTES) -> int:
        """Size of parameters and buffers."""
        return sum(
            tensor.numel() * (float_bytes if tensor.is_floating_point() else tensor.itemsize)
            for tensor in self.draft.state_dict().values()
        )

    def _optimizer_bytes(self, plan: TrainingPlan) -> tuple[int, int]:
        """Size of the state that is kept between steps, and of what a step needs temporarily."""
        of_muon: list[int] = []
        if plan.optimizer.name == "muon":
            for part in MuonAdamW(self.draft, plan.optimizer.learning_rate).parts:
                if isinstance(part, torch.optim.Muon):
                    of_muon += [w.numel() for group in part.param_groups for w in group["params"]]
        of_adamw = self.num_trained - sum(of_muon)
        # AdamW on a GPU computes the roots of all second moments at once. Muon works on one matrix
        # at a time: its update, the orthogonal one and products of it.
        working = FLOAT_BYTES * (of_adamw + 5 * max(of_muon, default=0))
        return FLOAT_BYTES * (2 * of_adamw + sum(of_muon)), working

    def _state_bytes(self, plan: TrainingPlan) -> int:
        return self._weight_bytes() + self._optimizer_bytes(plan)[0]

    def _token_bytes(self, dtype: torch.dtype) -> int:
        """Size of a token's states: those that the draft reads, and the last."""
        return (len(self.draft.aux_layer_ids) + 1) * states_width(self.draft) * dtype.itemsize

    # ---- memory of the device ----

    def _device_parts(self, plan: TrainingPlan) -> dict[str, int]:
        weights, trained = self._weight_bytes(), FLOAT_BYTES * self.num_trained
        states, working = self._optimizer_bytes(plan)
        shards = self.world_size if plan.run.fsdp else 1
        step = self._step_memory(plan)
        dtype = compute_dtype(plan, self.device)
        row_dtypes = {self.stored_dtype, dtype}
        parts = {
            "weights": weights // shards,
            "gradients": trained // shards,
            "optimizer": states // shards,
            "activations": max(working, step.size_bytes),
            "row": plan.data.row_length * (INDEX_BYTES + sum(map(self._token_bytes, row_dtypes))),
            "verifier": self.verifier_bytes,
            "libraries": LIBRARIES_BYTES,
        }
        between = 0  # used between steps
        if plan.run.fsdp:
            # In the type of the computation, and gradients in float32 until they are summed.
            share = dtype.itemsize / FLOAT_BYTES
            parts["gathered shards"] = int(share * weights + (share + 1) * trained)
            between += 2 * weights  # gathered for evaluation, beside the draft that takes it
        elif self.world_size > 1:
            parts["gradients to send"] = trained
        if plan.evaluation.decode or plan.data.kind == "texts":
            between += self._verifier_work_bytes(plan)
        else:
            parts["verifier"] = min(parts["verifier"], bytes_of([self.draft.verifier_head]))
        freed = parts["activations"] + parts.get("gathered shards", 0)
        parts["between steps, beyond what one frees"] = max(0, between - freed)
        return parts

    def _step_memory(self, plan: TrainingPlan) -> StepMemory:
        key = (plan.data.row_length, plan.run.gradient_checkpointing, plan.run.dtype)
        if key not in self.rehearsed:
            try:
                self.rehearsed[key] = step_memory(self.draft, plan, self.device)
            except RuntimeError as error:  # another package's draft, which reads values
                name = type(self.draft).__name__
                logger.warning("did not count activations of %s: %s", name, first_line(error))
                self.rehearsed[key] = StepMemory(0, 0)
        return self.rehearsed[key]

    def _verifier_work_bytes(self, plan: TrainingPlan) -> int:
        """Size of the KV cache of decoded prompts, as long as a row, and of one layer's work."""
        config, length = _verifier_config(self.draft), plan.data.row_length
        size = self.draft.verifier_head.lm_head.weight.itemsize
        sizes = layer_sizes(config, {}).values  # of one with other layers, those of a like draft
        hidden, heads = config.hidden_size, sizes["num_attention_heads"]
        head_dim, depth = sizes["head_dim"], required_size(config, "num_hidden_layers")
        num_texts, cached = 1, 0
        if plan.evaluation.decode:
            num_texts, cached = DECODED_AT_ONCE, length + plan.evaluation.max_tokens
        token_cache = 2 * depth * sizes["num_key_value_heads"] * head_dim * size
        # Residual, norm, attention and its output; gate, up and product; the states that are read,
        # and their concatenation; the mask of rows by rows, as bool and as a term of scores.
        widths = 2 * hidden + 4 * heads * head_dim + 3 * sizes["intermediate_size"]
        widths += 2 * (len(self.draft.aux_layer_ids) + 1) * hidden
        worked_on = length * (size * widths + (1 + size) * length)
        return num_texts * (cached * token_cache + worked_on)

    # ---- main memory ----

    def _main_memory_parts(self, plan: TrainingPlan) -> dict[str, int]:
        data, token = plan.data, INDEX_BYTES + self._token_bytes(self.stored_dtype)
        row = data.row_length * token
        held_out = round(data.eval_examples * self.eval_tokens_each)
        workers = data.num_workers if data.kind == "store" else 0
        ahead = workers * (PREFETCHED_ROWS + 2) or 2  # one is being made from its examples
        parts = {
            "rows read ahead": ahead * row,
            "held-out examples and rows": 2 * held_out * token,
        }
        if data.kind in ("queue", "online"):
            parts["queue"] = data.queue_size * row
        parts["copy to save"] = self._state_bytes(plan)
        return parts


def _with(plan: TrainingPlan, section: str, **options: object) -> TrainingPlan:
    """The plan with changed options in one of its sections."""
    changed = getattr(plan, section).model_copy(update=options)
    return plan.model_copy(update={section: changed})


def _verifier_config(draft: SpeculatorModel) -> PretrainedConfig:
    """Config of the verifier that is attached in full; else an estimate from the draft's layers."""
    whole, *_ = attached_to(draft)
    if isinstance(whole, PreTrainedModel):
        return whole.config.get_text_config()
    config = copy(draft.config.transformer_layer_config)
    config.num_hidden_layers = draft.config.verifier_depth or config.num_hidden_layers
    return config
