"""What a draft learns from: packed rows, each token beside the verifier's states."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class Batch:
    """Row t holds token t, its document, its position in it and its states; nothing is shifted.

    Each algorithm shifts from here, inside its own file. Padding has document id -1.
    """

    input_ids: Int[Tensor, "batch seq"]
    document_ids: Int[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"]
    loss_mask: Bool[Tensor, "batch seq"]
    """Tokens that the draft learns to propose."""
    hidden_states: Float[Tensor, "batch seq aux_hidden"]
    """Aux hidden states, ascending by layer, side by side."""
    last_hidden_states: Float[Tensor, "batch seq hidden"]
    """After all layers, before the final norm."""

    def __post_init__(self) -> None:
        if self.input_ids.shape[0] != 1:
            raise ValueError(f"a batch is one packed row, found {self.input_ids.shape[0]} rows")

    def to(self, dtype: torch.dtype) -> "Batch":
        """The same rows with states of this type."""
        return replace(
            self,
            hidden_states=self.hidden_states.to(dtype),
            last_hidden_states=self.last_hidden_states.to(dtype),
        )
