"""DeepSpeed's ZeRO: options, and shards as whole tensors.

ZeRO keeps weights and AdamW's moments flat, in pieces of one length for each process. States of a
run have them whole and by name, so that a run resumes with and without DeepSpeed.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module  # of DeepSpeed, which is optional
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from pydantic import JsonValue
from torch import Tensor, nn

from speculators_core.errors import SpeculatorError
from speculators_core.files import read_json

MOMENTS = ("exp_avg", "exp_avg_sq")
DECIDED = ("optimizer", "scheduler", "fp16", "bf16", "amp")
"""Sections of DeepSpeed's configuration that the plan decides."""
DEFAULTS: dict[str, JsonValue] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""Values of keys that a configuration leaves out; `auto` is the plan's."""


def read_deepspeed_config(path: Path) -> dict[str, JsonValue]:
    """DeepSpeed's configuration, for Transformers' trainer.

    Raises:
        SpeculatorError: DeepSpeed is not installed, the file cannot be read, or it has a section
            that the plan decides.
    """
    if find_spec("deepspeed") is None:
        raise SpeculatorError(
            "run.deepspeed: DeepSpeed is not installed. Run `pip install "
            "'speculators-vllm[deepspeed]'`, or use run.fsdp, which needs nothing else."
        )
    content = read_json(path)
    for name in DECIDED:
        if name in content:
            raise SpeculatorError(
                f"{path}: the section {name} is decided by the plan (optimizer.*, run.dtype); "
                "expected zero_optimization and options of communication. Remove it."
            )
    return {**DEFAULTS, **content}


def is_zero(model: nn.Module) -> bool:
    """Whether DeepSpeed has taken over the weights."""
    return any(hasattr(one, "ds_id") or hasattr(one, "_hp_mapping") for one in model.parameters())


def shape_of(weight: Tensor) -> torch.Size:
    """Shape of the whole weight; under ZeRO 3 the tensor itself is empty."""
    return getattr(weight, "ds_shape", weight.shape)


def whole_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float32 and the buffers, whole on each process; all processes call it."""
    deepspeed, found = import_module("deepspeed"), {}
    for name, tensor in weights.items():
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            found[name] = deepspeed.utils.safe_get_full_fp32_param(tensor).view(shape_of(tensor))
        else:
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                found[name] = tensor.detach().clone()
    return found


class ZeroStates:
    """AdamW's states under ZeRO, by weight."""

    def __init__(self, optimizer: Any) -> None:
        """``optimizer``: DeepSpeed's, which shards the AdamW in its ``optimizer``."""
        self._zero = optimizer
        self._is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self._flat: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat
            if self._is_stage_3
            else optimizer.single_partition_of_fp32_groups
        )
        self._adamw = optimizer.optimizer

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Options of the groups, without their weights."""
        return [
            {name: value for name, value in group.items() if name != "params"}
            for group in self._adamw.param_groups
        ]

    def read(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors as `<weight>/<name>`; none before the first step."""
        if not self._adamw.state:
            return {}
        self._link()
        step = next(iter(self._adamw.state.values()))["step"]
        utils, found = import_module("deepspeed.utils"), {}
        for name, weight in weights.items():
            for key in MOMENTS:
                whole = utils.safe_get_full_optimizer_state(weight, key)
                found[f"{name}/{key}"] = whole.view(shape_of(weight))
            found[f"{name}/step"] = torch.as_tensor(step).clone()
        return found

    def write(
        self,
        weights: Mapping[str, Tensor],
        stored: Mapping[str, Tensor],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """Puts each process's piece of whole tensors in its place, and sets options of the groups.

        The learning rate is one of these: a scheduler that is loaded does not set it.
        """
        for group, options in zip(self._adamw.param_groups, groups, strict=True):
            group |= {name: value for name, value in options.items() if name != "params"}
        steps = [tensor for name, tensor in stored.items() if name.endswith("/step")]
        if not steps:
            return
        for flat in self._flat:
            zeros = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            self._adamw.state[flat] = {"step": steps[0].clone(), **zeros}
        self._link()
        for name, weight in weights.items():
            for key in MOMENTS:
                self._place(weight, key, stored[f"{name}/{key}"].to(self._flat[0].device))

    def _link(self) -> None:
        """Lets each weight know its piece of the states.

        DeepSpeed 0.19 does so after the first group's first step, when the others have no state.
        """
        if not self._is_stage_3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _place(self, weight: Any, key: str, whole: Shaped[Tensor, "..."]) -> None:
        if not self._is_stage_3:
            weight.set_full_hp_param(whole, key)
            return
        piece, _ = self._zero._get_fp32_opt_state_partition(weight, False, key)
        padded = nn.functional.pad(
            whole.flatten(), (0, piece.numel() * dist.get_world_size() - whole.numel())
        )
        piece.copy_(padded.narrow(0, piece.numel() * dist.get_rank(), piece.numel()))
