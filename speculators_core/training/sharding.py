"""A draft sharded over devices, and its whole copy."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from speculators_core.models.speculator import SpeculatorModel
from speculators_core.training.zero import is_zero, whole_weights


def shard(model: SpeculatorModel, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Shards weights, gradients and optimizer states over all ranks (FSDP2), in place.

    Each MLP is a unit, all else another: the head is read inside ``forward`` of the draft, not by
    its own. ``dtype``: of the computation, while the shards stay float32.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model.to(device)
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def gather_draft(model: SpeculatorModel) -> SpeculatorModel:
    """A whole copy of a sharded draft on each rank, with the same verifier; every rank calls it."""
    tensors: Mapping[str, Any]
    if is_zero(model):
        tensors = whole_weights(model.state_dict(keep_vars=True))
        dtype = torch.float32
    else:
        tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        dtype = model.dtype
    whole = type(model)(copy.deepcopy(model.config)).to(model.device, dtype)
    whole.load_state_dict(tensors)
    whole.attached, whole.unset = model.attached, set()
    return whole.eval()
