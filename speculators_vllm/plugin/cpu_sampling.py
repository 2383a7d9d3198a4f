"""Sampling with speculation on a CPU, mended: three faults of vLLM 0.32 in its CPU paths.

One: the kernel that gives every drafted token its request's settings writes into a copy wherever
the values are no int64, as temperature, top-k and top-p are not; logits are then divided by memory
that nobody wrote (https://github.com/vllm-project/vllm/issues/55005).

Two: where a sample is thrown away, because a prompt is not read to its end, the request's generator
is put back by its offset. CPU generators have none, and the engine dies of any seeded request.

Three: in a step where no request of the batch has a draft, top-k is looked for among no logits, and
the engine dies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EXPAND_PARAMETERS = [
    "output",
    "input_val",
    "cu_num_tokens",
    "replace_from",
    "replace_to",
    "MAX_NUM_TOKENS",
]
"""Of `vllm.utils.cpu_triton_utils._expand_kernel_impl`, which `expand` stands in for."""


def expand(
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Writes each request's value once for each of its tokens.

    values [.7 0], tokens up to [3 5], 0 becomes 1 -> [.7 .7 .7 1 1]
    """
    values = torch.where(input_val == replace_from, replace_to, input_val)
    num_tokens = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    output.copy_(values.repeat_interleave(num_tokens))


def expanding(original: Callable[..., None]) -> Callable[..., None]:
    """The kernel to have in place of vLLM's."""
    return expand


def constraining(constrain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Top-k and the like for the logits of drafted tokens, where there are any."""

    def apply_sampling_constraints(
        logits: Tensor, cu_num_draft_tokens: Tensor, sampling_metadata: Any
    ) -> Tensor:
        if not len(logits):
            return logits
        return constrain(logits, cu_num_draft_tokens, sampling_metadata)

    return apply_sampling_constraints


def putting_generators_back(sample: Callable[..., Any]) -> Callable[..., Any]:
    """Sampling that leaves the generators of requests whose sample is thrown away as they were."""

    def _sample(self: Any, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        generators = self.input_batch.generators
        kept = {index: generators[index].get_state() for index in _thrown_away(self)}
        output = sample(self, logits, spec_decode_metadata)
        for index, state in kept.items():
            generators[index].set_state(state)
        return output

    return _sample


def hiding_generators(bookkeep: Callable[..., Any]) -> Callable[..., Any]:
    """Bookkeeping that finds no generators to put back: `putting_generators_back` has done it."""

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        hidden = {index: generators.pop(index) for index in _thrown_away(self)}
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            generators.update(hidden)

    return _bookkeeping_sync


def _thrown_away(runner: Any) -> list[int]:
    """Seeded requests of the batch whose sample is not kept."""
    batch = runner.input_batch
    is_discarded = runner.discard_request_mask.np[: batch.num_reqs]
    return [index for index in batch.generators if is_discarded[index]]
