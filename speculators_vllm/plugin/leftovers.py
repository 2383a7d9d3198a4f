"""Wrapper that hides tensors without use from vLLM's networks."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from speculators_core.format.checkpoint import LEFTOVERS

if TYPE_CHECKING:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    Loader = DefaultModelLoader
    Source = DefaultModelLoader.Source
    Tensors = Iterator[tuple[str, Tensor]]
    GetWeights = Callable[[Loader, Source], Tensors]


def skipping(original: "GetWeights") -> "GetWeights":
    """The tensors of a checkpoint without those that training leaves in a draft's file.

    vLLM refuses a draft for a tensor that its network does not know.
    """

    def get_weights(self: "Loader", source: "Source") -> "Tensors":
        return ((n, tensor) for n, tensor in original(self, source) if not LEFTOVERS.fullmatch(n))

    return get_weights
