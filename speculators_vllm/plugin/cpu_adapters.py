"""Wrapper that keeps LoRA adapters to their requests.

vLLM marks a token without an adapter by the place -1. Its kernels for CPUs take the last adapter
then: beside requests with adapters, one without is given the adapter of another.
"""

from collections.abc import Callable
from typing import Concatenate, ParamSpec

from jaxtyping import Float, Int
from torch import Tensor

Rest = ParamSpec("Rest")
Multiply = Callable[Concatenate[Tensor, Tensor, Tensor, Tensor, Rest], None]


def sparing_tokens_without(original: Multiply[Rest]) -> Multiply[Rest]:
    """Multiplies tokens without an adapter by nothing."""

    def multiply(
        inputs: Float[Tensor, "tokens inputs"],
        weights: Float[Tensor, "adapters *shape"],
        output: Float[Tensor, "tokens outputs"],
        adapters: Int[Tensor, "tokens"],
        *args: Rest.args,
        **kwargs: Rest.kwargs,
    ) -> None:
        if len(adapters) == len(inputs):
            inputs = inputs.masked_fill((adapters < 0)[:, None], 0)
        original(inputs, weights, output, adapters, *args, **kwargs)

    return multiply
