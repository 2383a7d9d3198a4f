"""Memory of a training step, counted without running it.

The draft's forward and backward run on *fake* tensors, which have a shape and a type but no memory,
and the sizes of those alive at one time are added up. The count therefore covers every algorithm,
objective and type, and follows changes of their code. Real steps are made only to time them.
"""

import math
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
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
"""Halvings of the range that contains the worst length of documents."""
MAPPED_BYTES = 2**25
"""Size from which glibc returns memory to the system as soon as it is freed."""
HEAP_MARGIN = 1.5
"""A heap can reuse freed memory for a request of another size only in part. So it grows to more
than the tensors alive at one time, and less than the sum of the most alive of each size. With glibc
2.36, four algorithms, widths of 128 to 512 and rows of 512 to 4096, main memory grew in six steps
to 0.9 to 1.5 times the geometric mean of the two."""
GPU_ALLOCATOR_SHARE = 0.2
"""Share of unused pieces of blocks, relative to the tensors alive at one time."""
TIMED_STEPS = 2
TIMED_S = 20.0
"""No further step is timed after so long."""
SHORT_ROW = 1024
"""Tokens of a row that is fast enough to begin with."""


class Fake(Tensor):
    """A tensor without memory, with the shape and type of one on the meta device."""

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
        raise NotImplementedError(f"{func} of a fake tensor, outside of `Rehearsal`")


class Rehearsal(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made and alive inside.

    Results of operations on fake tensors are fake. Indices and masks are real, on the CPU, because
    the shapes of other tensors depend on them; writing a fake tensor into one leaves it unchanged.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.is_backward = False
        self.has_recomputed = False
        """Whether attention was computed again in the backward pass instead of being kept."""
        self.live_bytes = self.peak_bytes = 0
        self._live_of: Counter[int] = Counter()
        self._most_of: Counter[int] = Counter()
        self._known: set[int] = set()

    @property
    def allocator_bytes(self) -> int:
        """Memory that the allocator holds beyond the tensors alive at one time."""
        if self.device.type != "cpu":
            return round(self.peak_bytes * GPU_ALLOCATOR_SHARE)
        apart = sum(self._most_of.values())
        return round(HEAP_MARGIN * (self.peak_bytes * apart) ** 0.5) - self.peak_bytes

    def stand_in(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Fake:
        """A fake tensor of the same shape for one that existed before, which is not counted."""
        like = torch.empty_like(tensor, dtype=dtype or tensor.dtype, device="meta")
        self._known.add(like.untyped_storage()._cdata)
        return Fake(like, self.device)

    def __torch_dispatch__(
        self, function: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
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

    def _on_shapes(self, function: OpOverload, args: tuple, kwargs: dict) -> object:
        if function is aten._local_scalar_dense.default:
            return 1  # an unknown value, such as that of a metric
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

    def _as_fake(self, leaf: object) -> object:
        return Fake(leaf, self.device) if isinstance(leaf, Tensor) else leaf

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage once for all its views, until the last one is deleted."""
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


def _leaves(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _mapped(change: Callable[[object], object], value: object) -> object:
    if isinstance(value, list | tuple):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_mapped(change, item) for item in value)
    return change(value)


def _on_meta(leaf: object) -> object:
    if isinstance(leaf, Fake):
        return leaf.like
    if isinstance(leaf, Tensor):
        return torch.empty_like(leaf, device="meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks as the places that they mark, whose number decides shapes."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


class _Step(nn.Module):
    """Forward and backward of a draft in one call, so that both use the fake weights."""

    def __init__(self, draft: SpeculatorModel) -> None:
        super().__init__()
        self.draft, self.head = draft, draft.verifier_head

    def forward(self, row: Batch, options: Mapping[str, object], rehearsal: Rehearsal) -> None:
        with _precision(row.aux_hidden_states.dtype, rehearsal.device):
            _, loss, _ = self.draft(row, **options)
        rehearsal.is_backward = True
        loss.backward()


class StepMemory(NamedTuple):
    """Peak memory of forward and backward of one row, beside weights, gradients and the row."""

    tensor_bytes: int
    """Size of the tensors alive at one time."""
    allocator_bytes: int
    """Memory that the allocator holds beyond them."""
    has_recomputed: bool = False
    """Whether attention was computed again in the backward pass."""

    @property
    def size_bytes(self) -> int:
        return self.tensor_bytes + self.allocator_bytes


def step_memory(draft: SpeculatorModel, plan: TrainingPlan, device: torch.device) -> StepMemory:
    """Peak memory of a step over one full row, for the worst lengths of its documents.

    Attention keeps its scores for the backward pass where they are few (`attention.py`), as in a
    row of shorter documents, so the peak may be at any length of the first document. Kept scores
    grow with its square, which gives the peak between the longest first document that was found to
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
    """Memory of a step over a full row whose first document has ``first_document`` tokens.

    The draft's weights count as float32, those of the verifier's head in their present type.

    Raises:
        NotImplementedError: the draft's ``forward`` depends on the values of its states.
    """
    options, _ = draft.trainer_kwargs(plan.model.objective)
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
    """A fake tensor for a weight of a `_Step`, with its gradient if it is trained.

    Ids of the draft's vocabulary are real, with arbitrary values.
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


def _precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
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
    """A row of random tokens, all trained: a first document of this length, then short ones.

    Its states have type ``dtype`` and are on ``states_on``, or on ``device`` where that is None.
    """
    width, states_on = states_width(draft), states_on or device
    rows = torch.arange(length, device=device)
    after = rows - first_document
    num_tokens = len(draft.verifier_head.embed_tokens.weight)
    aux_width = len(draft.aux_layer_ids) * width
    return Batch(
        input_ids=torch.randint(num_tokens, (1, length), device=device),
        document_ids=torch.where(after < 0, 0, 1 + after // QUERY_BLOCK)[None],
        position_ids=torch.where(after < 0, rows, after % QUERY_BLOCK)[None],
        loss_mask=torch.ones(1, length, dtype=torch.bool, device=device),
        aux_hidden_states=torch.randn(1, length, aux_width, dtype=dtype, device=states_on),
        last_hidden_states=torch.randn(1, length, width, dtype=dtype, device=states_on),
    )


@contextmanager
def _as_trained(draft: SpeculatorModel, plan: TrainingPlan, device: torch.device) -> Iterator[None]:
    """Training mode inside, with gradient checkpointing if the plan asks for it.

    Modes and random generators of this process are restored afterwards.
    """
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
    """Tokens per second, padding included, of whole steps over one full row.

    A step is forward, backward and optimizer. The first one, which is slower, counts only if it
    alone takes `TIMED_S`. Where steps over a full row would take longer than that, shorter rows are
    timed, and the time of a full one is extrapolated by the power of the length that fits the last
    two.

    Draft and verifier move to the device. Weights are restored afterwards, without gradients.
    """
    draft.to(device)
    if draft.attached is not None:
        draft.attached.move(device)
    trained = [weight for weight in draft.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in trained]
    make = MuonAdamW if plan.optimizer.name == "muon" else adamw
    optimizer = make(draft, plan.optimizer.learning_rate, plan.optimizer.weight_decay)
    options, _ = draft.trainer_kwargs(plan.model.objective)

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
    """Seconds of a step over a row, from rows of this length, or of as much as time allows."""
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
