"""A verifier's embeddings, final norm and head."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from speculators_core.errors import SpeculatorError

CHUNK_LOGITS = 2**23
"""Logits that exist at one time on a CPU; a product of fewer rows reads the head too often."""
GPU_CHUNK_LOGITS = 2**26
"""The same on a GPU, which is slow on small pieces."""
FEWEST_ROWS = 16
"""Rows whose logits are made together however wide the vocabulary."""

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names that families give to the bound of their logits."""

VerifierLogits = Callable[[Int[Tensor, "rows"]], Float[Tensor, "rows vocab"]]
"""Rows of a text to the verifier's logits in them, made when they are asked for."""


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """Rows whose logits are made together: those of a whole text can be gigabytes."""
    at_once = CHUNK_LOGITS if device.type == "cpu" else GPU_CHUNK_LOGITS
    return max(FEWEST_ROWS, at_once // vocab_size)


class VerifierHead(nn.Module):
    """The verifier's last steps: final norm, head, scale and soft cap; and its embedding table.

    Called with the state after all layers, before the final norm, it gives the verifier's logits.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        text_config = model.config.get_text_config()
        self.norm = decoder_of(model).norm
        self.embed_tokens = _Weights(model.get_input_embeddings())
        self.lm_head = _Weights(_output_embeddings(model))
        caps = [getattr(text_config, name, None) for name in SOFT_CAPS]
        self.soft_cap: float | None = next((cap for cap in caps if cap is not None), None)
        self.scale = float(getattr(text_config, "logit_scale", None) or 1.0) / float(
            getattr(text_config, "logits_scaling", None) or 1.0
        )

    def forward(
        self, last_hidden: Float[Tensor, "*rows hidden"], token_ids: Tensor | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits over the whole vocabulary, or over ``token_ids`` alone."""
        weight: Tensor = self.lm_head.weight
        bias: Tensor | None = self.lm_head.bias
        last_hidden = last_hidden.to(weight.device, weight.dtype)
        if token_ids is not None:
            weight, bias = weight[token_ids], None if bias is None else bias[token_ids]
        logits = nn.functional.linear(self.norm(last_hidden), weight, bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return (
            logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap
        )

    def chunks(
        self, last_hidden: Float[Tensor, "rows hidden"]
    ) -> Iterator[Float[Tensor, "some_rows vocab"]]:
        """Logits over the whole vocabulary, of a few rows at a time."""
        weight = self.lm_head.weight
        for rows in last_hidden.split(rows_at_once(len(weight), weight.device)):
            yield self(rows)


class _Weights(nn.Module):
    """The weights of an embedding or a head, without what its family does around them."""

    def __init__(self, module: Any):
        super().__init__()
        self.weight: nn.Parameter = module.weight
        self.bias: nn.Parameter | None = getattr(module, "bias", None)


def _output_embeddings(model: PreTrainedModel) -> Any:
    head = model.get_output_embeddings()
    if head is None:
        raise SpeculatorError(
            f"{type(model).__name__} has no head; expected a language model. Pass its causal "
            "language model class."
        )
    return head


STACKS = ("model", "backbone", "transformer", "decoder")
"""Where a model keeps its stack, if it is not the stack itself."""
LAYERS = ("layers", "h", "blocks", "block")
FINAL_NORMS = (
    "norm",
    "final_layernorm",
    "final_layer_norm",
    "ln_f",
    "norm_f",
    "final_norm",
    "embedding_norm",
    "layer_norm",
    "out_norm",
    "ln_out",
)
"""Names that families of Transformers give to a stack's layers and to the norm after them."""


@dataclass(frozen=True)
class Stack:
    """The stack of layers of a causal language model."""

    module: nn.Module
    layers_name: str
    norm: nn.Module
    """The norm after the last layer."""

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.module, self.layers_name)


def decoder_of(model: PreTrainedModel) -> Stack:
    """The stack of layers of a causal language model, with its layers and final norm.

    Raises:
        SpeculatorError: the model has no such stack.
    """
    found: Any = model.get_decoder()
    while found is not None:
        layers = _child(found, LAYERS, nn.ModuleList)
        norm = _child(found, FINAL_NORMS, nn.Module)
        if layers is not None and norm is not None:
            return Stack(found, layers, getattr(found, norm))
        if layers is not None:
            break
        inner = _child(found, STACKS, nn.Module)
        found = None if inner is None else getattr(found, inner)
    raise SpeculatorError(
        f"{type(model).__name__} has no stack of layers with a final norm; "
        "expected a decoder-only language model. Choose such a verifier."
    )


def _child(module: nn.Module, names: Iterable[str], kind: type[nn.Module]) -> str | None:
    """The first of these names under which the module has one of this kind."""
    return next((name for name in names if isinstance(getattr(module, name, None), kind)), None)
