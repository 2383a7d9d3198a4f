"""A training step without memory, to count what it would hold; and a few real ones, to time them.

The draft's own forward and backward run on *fake* tensors, which have a shape and a type but no
memory, and what lives of them at one time is added up. So the count holds for every algorithm,
objective and type, and changes with the code that it is about.
"""

import math
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from speculators_core.batch import Batch
from speculators_core.models.parts.attention import QUERY_BLOCK
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.training.device import compute_dtype
from speculators_core.training.optimizers import MuonAdamW, adamw
from speculators_core.training.settings import TrainingPlan

aten = torch.ops.aten
CPU = torch.device("cpu")
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
SEARCH_STEPS = 3
"""Halvings of the range in which the worst length of documents lies."""
MAPPED_BYTES = 2**25
"""Memory of this size or more glibc gives back to the system as soon as it is freed."""
HEAP_MARGIN = 1.5
"""A heap can give what was freed to a request of another size only in part. So it grows to more
than the tensors that live at one time, and less than the most that lived of each size, added up.
With glibc 2.36, four algorithms, widths of 128 to 512 and rows of 512 to 4096, main memory grew in
six steps to 0.9 to 1.5 times the geometric mean of the two."""
GPU_ALLOCATOR_SHARE = 0.2
"""Of the tensors that live at one time, as unused pieces of blocks."""
TIMED_STEPS = 2
TIMED_S = 20.0
"""No further step is timed after so long."""
SHORT_ROW = 1024
"""Tokens of a row that takes no time."""


class Fake(Tensor):
    """A tensor without memory; its shape and type are those of one on the meta device."""

    like: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # a C one

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device) -> "Fake":
        return Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=device,
        )

    def __init__(self, like: Tensor, device: torch.device) -> None:
        self.like = like

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]  # PyTorch declares it without the function
        raise NotImplementedError(f"{func} of a fake tensor, outside of its rehearsal")


class Rehearsal(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made and alive while it is entered.

    What is computed from fake tensors is fake. Indices and masks are real, because the shapes of
    others depend on them, and on the CPU; one that a fake tensor is written into keeps what it had.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.is_backward = False
        self.has_recomputed = False
        """Attention was computed once more in the backward pass instead of being kept."""
        self.live_bytes = self.peak_bytes = 0
        self._live_of: Counter[int] = Counter()
        self._most_of: Counter[int] = Counter()
        self._known: set[int] = set()

    @property
    def allocator_bytes(self) -> int:
        """What the allocator holds beyond the tensors that live at one time."""
        if self.device.type != "cpu":
            return round(self.peak_bytes * GPU_ALLOCATOR_SHARE)
        apart = sum(self._most_of.values())
        return round(HEAP_MARGIN * (self.peak_bytes * apart) ** 0.5) - self.peak_bytes

    def stand_in(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Fake:
        """A fake tensor of the same shape, which was there before and is not counted."""
        like = torch.empty_like(tensor, dtype=dtype or tensor.dtype, device="meta")
        self._known.add(like.untyped_storage()._cdata)
        return Fake(like, self.device)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, Fake) for leaf in _leaves([*args, *kwargs.values()])):
            made = self._on_shapes(function, args, kwargs)
        else:
            made = function(*args, **kwargs | ({"device": CPU} if kwargs.get("device") else {}))
        for leaf in _leaves([made]):
            if isinstance(leaf, Tensor):
                self._count((leaf.like if isinstance(leaf, Fake) else leaf).untyped_storage())
        self.has_recomputed |= self.is_backward and function is aten._softmax.default
        return made

    def _on_shapes(self, function: Any, args: tuple, kwargs: dict) -> Any:
        if function is aten._local_scalar_dense.default:
            return 1  # a value that nobody knows: of a metric, say
        written = function._schema.arguments[0].alias_info
        is_written = written is not None and written.is_write
        if is_written and not isinstance(args[0], Fake):
            return args[0]
        if function in INDEXING:
            args = (args[0], _places(args[1]), *args[2:])
        made = function(
            *(_mapped(_on_meta, value) for value in args),
            **{name: _mapped(_on_meta, value) for name, value in kwargs.items()},
        )
        return args[0] if is_written else _mapped(self._as_fake, made)

    def _as_fake(self, leaf: Any) -> Any:
        return Fake(leaf, self.device) if isinstance(leaf, Tensor) else leaf

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Once for all views of it, until the last one is gone."""
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self._change(size, size)
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._change(size, -size)

    def _change(self, size: int, change: int) -> None:
        kind = min(size, MAPPED_BYTES)
        self.live_bytes += change
        self._live_of[kind] += change
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._most_of[kind] = max(self._most_of[kind], self._live_of[kind])


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_mapped(change, item) for item in value)
    return change(value)


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, Fake):
        return leaf.like
    if isinstance(leaf, Tensor):
        return torch.empty_like(leaf, device="meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks as the places that they mark: how many there are decides on shapes."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


class _Step(nn.Module):
    """Forward and backward of a draft in one call, so that fake weights serve both."""

    def __init__(self, draft: SpeculatorModel) -> None:
        super().__init__()
        self.draft, self.head = draft, draft.verifier_head

    def forward(self, row: Batch, options: Mapping[str, Any], rehearsal: Rehearsal) -> None:
        with _precision(row.aux_hidden_states.dtype, rehearsal.device):
            _, loss, _ = self.draft(row, **options)
        rehearsal.is_backward = True
        loss.backward()


class StepMemory(NamedTuple):
    """What forward and backward of one row hold at most, beside weights, gradients and the row."""

    tensor_bytes: int
    """Of the tensors that live at one time."""
    allocator_bytes: int
    """Of what the allocator holds beyond them."""
    has_recomputed: bool = False
    """Attention was computed once more in the backward pass."""

    @property
    def size_bytes(self) -> int:
        return self.tensor_bytes + self.allocator_bytes


def step_memory(draft: SpeculatorModel, plan: TrainingPlan, device: torch.device) -> StepMemory:
    """The most that a step over one full row can hold, whatever documents are in it.

    Attention keeps its scores for the backward pass where they are few (`attention.py`), as in a
    row of shorter documents: the most may be held where the first document is of any length. Kept
    scores grow with the square of it, which tells what lies between the longest that was found to
    keep them and the shortest that was not.
    """
    high = plan.data.row_length
    most = rehearse(draft, plan, device, high)
    if not most.has_recomputed or high <= QUERY_BLOCK:
        return most
    low, least = QUERY_BLOCK, rehearse(draft, plan, device, QUERY_BLOCK)
    kept = least
    for _ in range(0 if least.has_recomputed else SEARCH_STEPS):
        middle = round((low * high) ** 0.5)
        found = rehearse(draft, plan, device, middle)
        if found.has_recomputed:
            high, most = middle, max(most, found, key=_size)
        else:
            low, kept = middle, found
    if low > QUERY_BLOCK:
        ahead = (high**2 - low**2) / (low**2 - QUERY_BLOCK**2)
        tensor_bytes, allocator_bytes = (
            round(now + ahead * max(0, now - before))
            for now, before in zip(kept[:2], least[:2], strict=True)
        )
        kept = StepMemory(tensor_bytes, allocator_bytes)
    return max(most, kept, key=_size)


def _size(memory: StepMemory) -> int:
    return memory.size_bytes


def rehearse(
    draft: SpeculatorModel, plan: TrainingPlan, device: torch.device, first_document: int
) -> StepMemory:
    """Memory of a step over a full row that begins with a document of so many tokens.

    Weights count as float32, whatever they are now, those of the verifier's head as they are.

    Raises:
        NotImplementedError: the draft's ``forward`` decides something by the values of its states.
    """
    options, _ = draft.get_trainer_kwargs(**plan.model.objective)
    rehearsal, step, dtype = Rehearsal(device), _Step(draft), compute_dtype(plan, device)
    with _as_trained(draft, plan, device):
        length = plan.data.row_length
        row = _make_row(draft, dtype, length, first_document, CPU, states_on=torch.device("meta"))
        row = replace(
            row,
            aux_hidden_states=rehearsal.stand_in(row.aux_hidden_states),
            last_hidden_states=rehearsal.stand_in(row.last_hidden_states),
        )
        named = [*step.named_parameters(), *step.named_buffers()]
        weights = {name: _stand_in(rehearsal, name, tensor) for name, tensor in named}
        torch.default_generator.manual_seed(plan.run.seed)  # the same count in every call
        with rehearsal:
            functional_call(step, weights, (row, options, rehearsal))
    return StepMemory(rehearsal.peak_bytes, rehearsal.allocator_bytes, rehearsal.has_recomputed)


def _stand_in(rehearsal: Rehearsal, name: str, tensor: Tensor) -> Tensor:
    """For a weight of a `_Step`, with its gradient where it trains.

    Ids of the draft's vocabulary are real, whichever they are.
    """
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, device=CPU)
    dtype = torch.float32 if name.startswith("draft.") else tensor.dtype
    weight = rehearsal.stand_in(tensor, dtype)
    if tensor.requires_grad:
        weight.grad = rehearsal.stand_in(tensor, dtype)
        weight.requires_grad_()
    return weight


# ---- a row and how it is trained on ----


def _precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def states_width(draft: SpeculatorModel) -> int:
    """Width of one state of the verifier."""
    return draft.verifier_head.lm_head.weight.shape[1]


def _make_row(
    draft: SpeculatorModel,
    dtype: torch.dtype,
    length: int,
    first_document: int,
    device: torch.device,
    states_on: torch.device | None = None,
) -> Batch:
    """A row of random tokens, all to be learnt: a document of so many, and short ones behind it.

    Its states, of this type, are on ``device`` where ``states_on`` is None.
    """
    width, states_on = states_width(draft), states_on or device
    rows = torch.arange(length, device=device)
    behind = rows - first_document
    num_tokens = len(draft.verifier_head.embed_tokens.weight)
    aux_width = len(draft.aux_layer_ids) * width
    return Batch(
        input_ids=torch.randint(num_tokens, (1, length), device=device),
        document_ids=torch.where(behind < 0, 0, 1 + behind // QUERY_BLOCK)[None],
        position_ids=torch.where(behind < 0, rows, behind % QUERY_BLOCK)[None],
        loss_mask=torch.ones(1, length, dtype=torch.bool, device=device),
        aux_hidden_states=torch.randn(1, length, aux_width, dtype=dtype, device=states_on),
        last_hidden_states=torch.randn(1, length, width, dtype=dtype, device=states_on),
    )


@contextmanager
def _as_trained(draft: SpeculatorModel, plan: TrainingPlan, device: torch.device) -> Iterator[None]:
    """In training mode, recomputing its layers if the plan says so; modes and random numbers of
    this process are afterwards as they were."""
    was_training, was_recomputing = draft.training, draft.is_gradient_checkpointing
    recomputes = plan.run.gradient_checkpointing and draft.supports_gradient_checkpointing
    devices = [device] if device.type == "cuda" else []
    draft.train()
    if recomputes and not was_recomputing:
        draft.gradient_checkpointing_enable()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        draft.train(was_training)
        if recomputes and not was_recomputing:
            draft.gradient_checkpointing_disable()


# ---- time ----


def measure_rate(draft: SpeculatorModel, plan: TrainingPlan, device: torch.device) -> float:
    """Tokens a second, padding included, of whole steps over one full row: forward, backward,
    optimizer. The first step, which is slower, counts only where it alone takes `TIMED_S`.

    Where steps over a full row would take longer, shorter rows are timed, and a full one is taken
    to follow the power of the length that the last two show.

    Draft and verifier move to the device. Weights are afterwards as they were, without gradients.
    """
    draft.to(device)
    if draft.attached is not None:
        draft.attached.move(device)
    trained = [weight for weight in draft.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in trained]
    make = MuonAdamW if plan.optimizer.name == "muon" else adamw
    optimizer = make(draft, plan.optimizer.learning_rate, plan.optimizer.weight_decay)
    options, _ = draft.get_trainer_kwargs(**plan.model.objective)

    def time_steps(length: int) -> float:
        row = _make_row(draft, compute_dtype(plan, device), length, length, device)
        seconds: list[float] = []
        while len(seconds) <= TIMED_STEPS and sum(seconds) < TIMED_S:
            start = time.perf_counter()
            with _precision(row.aux_hidden_states.dtype, device):
                _, loss, _ = draft(row, **options)
            loss.backward()
            optimizer.step()
            draft.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:] or seconds)

    try:
        with _as_trained(draft, plan, device):
            return plan.data.row_length / _time_row(time_steps, plan.data.row_length)
    finally:
        draft.zero_grad()
        with torch.no_grad():
            for weight, value in zip(trained, before, strict=True):
                weight.copy_(value)


def _time_row(time_steps: Callable[[int], float], row_length: int) -> float:
    """Seconds of a step over a row, from rows of it and of its halves as far as time allows."""
    lengths = [row_length]
    while lengths[0] >= 2 * SHORT_ROW:
        lengths.insert(0, lengths[0] // 2)
    taken: list[float] = []
    for length in lengths:
        taken.append(time_steps(length))
        if (1 + TIMED_STEPS) * 4 * taken[-1] > TIMED_S:  # of twice the length, at most
            break
    power = math.log2(taken[-1] / taken[-2]) if len(taken) > 1 else 1.0
    missing = row_length / lengths[len(taken) - 1]
    return taken[-1] * missing ** min(2.0, max(1.0, power))
