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

    vLLM refuses a draft for a tensor that its network does not know: also for a map of the whole
    vocabulary to itself, which release 0.3 of the public library writes.
    """

    def get_weights(self: "Loader", source: "Source") -> "Tensors":
        for name, tensor in original(self, source):
            maps_nothing = name == "d2t" and not tensor.any()
            if not maps_nothing and not LEFTOVERS.fullmatch(name):
                yield name, tensor

    return get_weights
