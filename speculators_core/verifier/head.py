"""A verifier's embeddings, final norm and head."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from speculators_core.errors import SpeculatorError

CHUNK_LOGITS = 2**19
"""Logits that exist at one time on a CPU: what its cache holds."""
GPU_CHUNK_LOGITS = 2**26
"""The same on a GPU, which is slow on small pieces."""
FEWEST_ROWS = 16
"""Rows whose logits are made together however wide the vocabulary."""

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
        self.soft_cap: float | None = getattr(text_config, "final_logit_softcapping", None)
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
        logits = nn.functional.linear(self.norm(last_hidden), weight, bias) * self.scale
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


def decoder_of(model: PreTrainedModel) -> Any:
    """The stack of layers of a causal language model, with its ``layers`` and ``norm``.

    Raises:
        SpeculatorError: the model has no such stack.
    """
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers") and hasattr(decoder, "model"):
        decoder = decoder.model  # a text model with a head of its own, inside a vision model
    if not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        raise SpeculatorError(
            f"{type(model).__name__} has no stack of layers with a final norm; "
            "expected a decoder-only language model. Choose such a verifier."
        )
    return decoder
