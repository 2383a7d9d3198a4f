"""State from which a run resumes, without pickle.

    weights.safetensors     parameters and buffers as they are trained; the first of tied ones
    optimizer.safetensors   the optimizer's tensors, each as `<weight>/<name>`
    optimizer.json          its groups, and its values that are not tensors
    scheduler.json
    trainer_state.json
    rng.safetensors         random states of Python, NumPy and torch, one row per process

Tensors are stored whole, however they are sharded: one process, DDP and FSDP2 with any number of
processes write the same weights and optimizer, and each can read the files of the others.

`torch.distributed.checkpoint.state_dict` is not used because it is not exact (torch 2.13): it gives
a state to weights that never had a gradient, and steps an optimizer that has not stepped yet.
"""

import itertools
import json
import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from xxhash import xxh3_64

from speculators_core.errors import SpeculatorError, first_line
from speculators_core.training.optimizers import MuonAdamW
from speculators_core.training.states.state_folder import (
    OPTIMIZER,
    OPTIMIZER_GROUPS,
    RNG,
    SCHEDULER,
    TRAINER_STATE,
    WEIGHTS,
    Content,
    check_file,
    check_state,
    write_whole,
)
from speculators_core.training.states.state_folder import newest_state as newest_state
from speculators_core.training.states.state_folder import rotate_states as rotate_states
from speculators_core.training.zero import ZeroStates, is_zero, shape_of, whole_weights

logger = logging.getLogger(__name__)

Group = dict[str, Any]
"""A group of an optimizer: its options, of any type, and its weights' names as ``params``."""


class PartState(TypedDict):
    """An optimizer's state without its tensors."""

    kind: str
    groups: list[Group]
    values: dict[str, dict[str, JsonValue]]
    """What is not a tensor in the states of weights, by their names."""


WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""Prefixes that torch.compile and torch's activation checkpointing add to names of weights."""


def write_state(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Stateful,
    trainer_state: str,
    is_writer: bool,
) -> None:
    """Writes ``run/checkpoint-<step>``, whole or not at all; a state of the same step is replaced.

    All processes call it, one of them with ``is_writer``; it returns when the state is on disk.
    ``model`` may be wrapped by DDP, sharded by FSDP2 or compiled, ``optimizer`` wrapped by
    accelerate; ``trainer_state`` is JSON.

    Raises:
        SpeculatorError: it cannot be written; every process raises it, and older states are kept.
    """
    random_states = _random_states()
    weights = _tensors_of(model)
    if is_zero(model):
        states, parts = _zero_states_of(optimizer, weights)
        weights = whole_weights(weights)
    else:
        states, parts = _states_of(optimizer, weights)
    device = next(iter(weights.values())).device
    contents: dict[str, Content] = {
        WEIGHTS: _gathered(weights, is_writer),
        OPTIMIZER: _gathered(states, is_writer),
        OPTIMIZER_GROUPS: json.dumps(parts, indent=1),
        SCHEDULER: json.dumps(scheduler.state_dict(), indent=1),
        TRAINER_STATE: trainer_state,
        RNG: {name: _of_all_processes(t, device) for name, t in random_states.items()},
    }
    error: Exception | None = None
    if is_writer:
        try:
            write_whole(folder, contents)
        except (OSError, SafetensorError, SpeculatorError) as found:
            error = found
    _raise_together(folder, error, device)


def read_state(folder: Path, *, model: nn.Module, optimizer: Optimizer, scheduler: Stateful) -> str:
    """Loads a saved state into objects made as the saved ones were; returns the trainer's state.

    Every process calls it. Random states are restored separately, by `restore_rng`: what is done
    in between may draw.

    Raises:
        SpeculatorError: a file is missing or damaged, or the state is of another model.
    """
    check_state(folder)
    if is_zero(model):  # its weights were read before they were sharded
        _read_zero(folder, optimizer, _tensors_of(model))
    else:
        weights = read_weights(folder, model)
        _read_optimizer(folder, optimizer, weights)
    scheduler.load_state_dict(_read_json(folder / SCHEDULER))
    return (folder / TRAINER_STATE).read_text(encoding="utf-8")


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Loads the weights of a saved state, and nothing else, into a model; returns the model's.

    Every process calls it.

    Raises:
        SpeculatorError: the file is missing or damaged, or of another model.
    """
    stored = load_file(check_file(folder, WEIGHTS))
    weights = _tensors_of(model)
    _check_same(folder / WEIGHTS, _kinds_of(stored), _kinds_of(weights))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(_placed(stored[name], weight))
    return weights


# ---- weights ----


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, not copies, by their names in the unwrapped model."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in known:  # tied to one before it
            continue
        known.add(id(tensor))
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        found[name] = tensor
    return found


def _gathered(tensors: Mapping[str, Tensor], is_writer: bool) -> dict[str, Tensor]:
    """The whole tensors in main memory at the writer, none elsewhere; all processes call it."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if is_writer:
            gathered[name] = whole.cpu().contiguous()
    return gathered


def _placed(stored: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, with the layout of ``like``; a number stays whole."""
    if isinstance(like, DTensor) and stored.shape == like.shape:
        return distribute_tensor(stored, like.device_mesh, like.placements, src_data_rank=None)
    return stored


def _kinds_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{t.dtype} {list(t.shape)}" for name, t in tensors.items()}


def _check_same(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raises SpeculatorError unless the saved tensors have the names and types of the run's."""
    for name in sorted(found.keys() | expected.keys()):
        saved, now = found.get(name, "absent"), expected.get(name, "absent")
        if saved != now:
            raise SpeculatorError(
                f"{path}: {name} is {saved:.200}, expected {now:.200}: the state is of another "
                "model or optimizer. Run with the options that saved it, or choose another "
                "run.output."
            )


# ---- optimizer ----


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _parts_of(optimizer: Optimizer) -> list[Optimizer]:
    optimizer = _unwrapped(optimizer)
    return optimizer.parts if isinstance(optimizer, MuonAdamW) else [optimizer]


def _states_of(
    optimizer: Optimizer, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[PartState]]:
    """The tensors of all states, and the rest of each part, with weights by name."""
    tensors: dict[str, Tensor] = {}
    parts: list[PartState] = []
    for part in _parts_of(optimizer):
        names = _names_in(part, weights)
        state = part.state_dict()
        values: dict[str, dict[str, JsonValue]] = {}
        for number, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{names[number]}/{key}"] = value
                else:
                    values.setdefault(names[number], {})[key] = value
        groups = [
            {**group, "params": [names[number] for number in group["params"]]}
            for group in state["param_groups"]
        ]
        parts.append({"kind": type(part).__name__, "groups": groups, "values": values})
    return tensors, parts


def _names_in(part: Optimizer, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights of an optimizer, in the order of the numbers in its ``state_dict``.

    Raises:
        ValueError: the model lacks one of the weights.
    """
    names = {id(weight): name for name, weight in weights.items()}
    optimized = [weight for group in part.param_groups for weight in group["params"]]
    if strange := [weight for weight in optimized if id(weight) not in names]:
        raise ValueError(
            f"{type(part).__name__} has {len(strange)} of {len(optimized)} weights that are not "
            f"the model's, the first of shape {list(strange[0].shape)}"
        )
    return [names[id(weight)] for weight in optimized]


def _zero_states_of(
    optimizer: Optimizer, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[PartState]]:
    """`_states_of` an AdamW that DeepSpeed shards: its groups are those of `optimizers.adamw`."""
    zero = ZeroStates(_unwrapped(optimizer))
    trained = _trained(weights)
    names = [[name for name, w in trained.items() if (len(shape_of(w)) >= 2) == m] for m in (1, 0)]
    groups = [
        {**group, "params": own}
        for group, own in zip(zero.groups, filter(None, names), strict=True)
    ]
    return zero.read(trained), [{"kind": "AdamW", "groups": groups, "values": {}}]


def _trained(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: w for name, w in weights.items() if isinstance(w, nn.Parameter) and w.requires_grad
    }


def _read_zero(folder: Path, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
    saved, path = _read_json(folder / OPTIMIZER_GROUPS), folder / OPTIMIZER_GROUPS
    _, present = _zero_states_of(optimizer, weights)
    _check_same(path, _places_in(saved), _places_in(present))
    stored, groups = load_file(folder / OPTIMIZER), saved[0]["groups"]
    ZeroStates(_unwrapped(optimizer)).write(_trained(weights), stored, groups)


def _read_optimizer(folder: Path, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
    saved = _read_json(folder / OPTIMIZER_GROUPS)
    _, present = _states_of(optimizer, weights)
    _check_same(folder / OPTIMIZER_GROUPS, _places_in(saved), _places_in(present))
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for path, tensor in load_file(folder / OPTIMIZER).items():
        name, _, key = path.rpartition("/")
        entries[name][key] = tensor
    states = []
    for part, before, now in zip(_parts_of(optimizer), saved, present, strict=True):
        state: dict[int, dict[str, Tensor | JsonValue]] = {}
        for number, name in enumerate(_names_in(part, weights)):
            # A copy: the bytes of the file would stay mapped, and change with it.
            tensors = {k: _placed(t, weights[name]).clone() for k, t in entries[name].items()}
            if found := {**tensors, **before["values"].get(name, {})}:
                state[number] = found
        states.append({"state": state, "param_groups": _numbered(before["groups"], now["groups"])})
    whole = _unwrapped(optimizer)
    whole.load_state_dict({"parts": states} if isinstance(whole, MuonAdamW) else states[0])


def _places_in(parts: Sequence[PartState]) -> dict[str, str]:
    """The name of the weight at each place of each optimizer."""
    return {
        f"weight {place} in group {number} of {part['kind']}": name
        for part in parts
        for number, group in enumerate(part["groups"])
        for place, name in enumerate(group["params"])
    }


def _numbered(saved: Sequence[Group], present: Sequence[Group]) -> list[dict[str, object]]:
    """Groups as ``load_state_dict`` takes them; JSON has turned tuples into lists."""
    count = itertools.count()
    groups = []
    for before, now in zip(saved, present, strict=True):
        values = {
            key: tuple(value) if isinstance(now.get(key), tuple) else value
            for key, value in before.items()
        }
        groups.append({**values, "params": [next(count) for _ in before["params"]]})
    return groups


def _read_json(path: Path) -> Any:  # what `write_state` wrote there
    return json.loads(path.read_text(encoding="utf-8"))


# ---- random states ----


def restore_rng(folder: Path, rank: int, world: int) -> bool:
    """Restores the random states of process ``rank`` of ``world``; returns whether they are exact.

    They are not exact where another number of processes, or another kind of device, saved them.
    Each process is then seeded from the saved states and its rank.

    Raises:
        SpeculatorError: the file is missing or damaged.
    """
    stored = load_file(check_file(folder, RNG))
    if len(stored["torch"]) == world and stored.keys() == _random_states().keys():
        _set_random_states({name: rows[rank].clone() for name, rows in stored.items()})
        return True
    digest = xxh3_64(f"{rank} {world}".encode())
    for name in sorted(stored):
        digest.update(stored[name].numpy().tobytes())
    seed = digest.intdigest() % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    logger.warning(
        "%s has the random states of %d processes with %s; there are %d now, seeded from them",
        folder,
        len(stored["torch"]),
        ", ".join(sorted(stored)),
        world,
    )
    return False


def _random_states() -> dict[str, Tensor]:
    """Random states of this process, in float64, which represents each of their numbers exactly."""
    _, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    keys = numpy["state"]["key"].tolist()
    states = {
        "python": [*words, gauss is not None, 0.0 if gauss is None else gauss],
        "numpy": [*keys, numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]],
    }
    found = {name: torch.tensor(state, dtype=torch.float64) for name, state in states.items()}
    found["torch"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    *words, has_gauss, gauss = states["python"].tolist()
    version = random.getstate()[0]
    random.setstate((version, tuple(map(int, words)), gauss if has_gauss else None))
    *keys, position, has_gauss, gauss = states["numpy"].tolist()
    key = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", key, int(position), int(has_gauss), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


# ---- processes ----


def _of_all_processes(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensors of all processes, stacked in the order of their ranks."""
    if not dist.is_initialized():
        return tensor[None]
    own = tensor.to(device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).cpu()


def _raise_together(folder: Path, error: Exception | None, device: torch.device) -> None:
    """Raises SpeculatorError in all processes if there is an error in one."""
    has_failed = torch.tensor(int(error is not None), device=device)
    if dist.is_initialized():
        dist.all_reduce(has_failed, op=dist.ReduceOp.MAX)
    if isinstance(error, SpeculatorError):
        raise error
    if has_failed:
        what = "see the process that writes" if error is None else first_line(error)
        raise SpeculatorError(
            f"{folder} could not be written: {what}. Free some space and run the same command to "
            "resume from the state before it."
        ) from error
