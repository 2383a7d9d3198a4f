"""Catches the states between a verifier's layers."""

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from speculators_core.errors import SpeculatorError
from speculators_core.verifier.head import decoder_of
from speculators_core.verifier.sizes import required_size

DEFAULT_NUM_AUX = 3


def default_aux_layer_ids(num_layers: int) -> list[int]:
    """EAGLE-3's choice: the states that enter layers 2, n // 2 and n - 3.

    Raises:
        SpeculatorError: the verifier has too few layers for three of them.
    """
    ids = [2, num_layers // 2, num_layers - 3]
    if ids != sorted(set(ids)):
        raise SpeculatorError(
            f"a verifier of {num_layers} layers is too shallow for the default aux layers {ids}. "
            f"Pass ascending layer ids in 0..{num_layers}.",
            cause="wrong layer ids",
        )
    return ids


class LayerTaps:
    """Catches, while it is entered, the states between a verifier's layers.

    Id k is the residual stream after k layers: 0 the embeddings, n the output of the last layer
    *before* the final norm.
    """

    def __init__(self, model: PreTrainedModel, layer_ids: Sequence[int]):
        self.decoder, self.name = decoder_of(model), type(model).__name__
        self.hidden_size = required_size(model.config.get_text_config(), "hidden_size")
        self.layer_ids = list(layer_ids)
        self._caught: dict[int, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "LayerTaps":
        layers = self.decoder.layers
        for layer_id in set(self.layer_ids) or {0}:  # of none, the first tells the shape
            reader = layers[layer_id] if layer_id < len(layers) else self.decoder.norm
            hook = self._catch_input(layer_id)
            handle = reader.register_forward_pre_hook(hook, with_kwargs=True)
            self._handles.append(handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _catch_input(self, layer_id: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._caught[layer_id] = args[0] if args else kwargs["hidden_states"]

        return hook

    def states(self, layer_ids: Sequence[int]) -> Float[Tensor, "batch seq states_hidden"]:
        """The last forward's states of these ids, side by side; of no ids a width of zero.

        Raises:
            SpeculatorError: the verifier passes something else than one state a token.
        """
        if not layer_ids:
            return next(iter(self._caught.values()))[..., :0]
        found = [self._caught[layer_id] for layer_id in layer_ids]
        for states in found:
            if states.ndim != 3 or states.shape[-1] != self.hidden_size:
                raise SpeculatorError(
                    f"{self.name} passes states of shape {list(states.shape)} between its layers; "
                    f"expected [texts, tokens, {self.hidden_size}]: more than one stream is not "
                    "supported. Choose a verifier of another family."
                )
        device = found[-1].device  # a verifier may be spread over several
        return torch.cat([states.to(device) for states in found], dim=-1)
