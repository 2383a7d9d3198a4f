"""Wrappers that fix sampled speculation on CPUs.

They work around three faults of vLLM 0.32 in its CPU paths.

One: the kernel that gives every drafted token its request's settings writes into a copy wherever
the values are not int64, as temperature, top-k and top-p are not; logits are then divided by memory
that nobody wrote (https://github.com/vllm-project/vllm/issues/55005).

Two: where a sample is discarded, because a prompt is not read to its end, the request's generator
is put back by its offset. CPU generators have none, and the engine fails on any seeded request.

Three: in a step where no request of the batch has a draft, top-k is looked for among no logits, and
the engine fails.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from speculators_vllm.plugin import patches

if TYPE_CHECKING:
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    Constrain = Callable[[Tensor, Tensor, SamplingMetadata], Tensor]
    Sample = Callable[[GPUModelRunner, Tensor | None, SpecDecodeMetadata | None], SamplerOutput]

Rest = ParamSpec("Rest")
Output = TypeVar("Output")
Bookkeep = Callable[Concatenate["GPUModelRunner", Rest], Output]


def patching_samplers(original: Callable[[], None]) -> Callable[[], None]:
    """Applies the patches for CPUs before a worker builds its sampler."""

    def register_triton_kernel_overrides() -> None:
        for patch in (*patches.FOR_CPU_SAMPLING, *patches.FOR_CPU_ADAPTERS):
            patch.apply()
        for patch in patches.FOR_CPU_GENERATORS:
            if not patch.apply():
                break
        original()

    return register_triton_kernel_overrides


def expand(
    output: Shaped[Tensor, "tokens"],
    input_val: Shaped[Tensor, "requests"],
    cu_num_tokens: Int[Tensor, "requests"],
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
    """The kernel in place of vLLM's."""
    return expand


def constraining(constrain: "Constrain") -> "Constrain":
    """Top-k and the like for the logits of drafted tokens, where there are any."""

    def apply_sampling_constraints(
        logits: Float[Tensor, "tokens vocab"],
        cu_num_draft_tokens: Int[Tensor, "requests"],
        sampling_metadata: "SamplingMetadata",
    ) -> Float[Tensor, "tokens vocab"]:
        if not len(logits):
            return logits
        return constrain(logits, cu_num_draft_tokens, sampling_metadata)

    return apply_sampling_constraints


def restoring_generators(sample: "Sample") -> "Sample":
    """Sampling that restores the generators of requests whose sample is discarded."""

    def _sample(
        self: "GPUModelRunner",
        logits: Float[Tensor, "tokens vocab"] | None,
        spec_decode_metadata: "SpecDecodeMetadata | None",
    ) -> "SamplerOutput":
        generators = self.input_batch.generators
        kept = {index: generators[index].get_state() for index in _discarded(self)}
        output = sample(self, logits, spec_decode_metadata)
        for index, state in kept.items():
            generators[index].set_state(state)
        return output

    return _sample


def hiding_generators(bookkeep: Bookkeep[Rest, Output]) -> Bookkeep[Rest, Output]:
    """Bookkeeping that finds no generators to put back: `restoring_generators` has done it."""

    def _bookkeeping_sync(
        self: "GPUModelRunner", *args: Rest.args, **kwargs: Rest.kwargs
    ) -> Output:
        generators = self.input_batch.generators
        hidden = {index: generators.pop(index) for index in _discarded(self)}
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            generators.update(hidden)

    return _bookkeeping_sync


def _discarded(runner: "GPUModelRunner") -> list[int]:
    """Seeded requests of the batch whose sample is not kept."""
    batch = runner.input_batch
    is_discarded = runner.discard_request_mask.np[: batch.num_reqs]
    return [index for index in batch.generators if is_discarded[index]]
