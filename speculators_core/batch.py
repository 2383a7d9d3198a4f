"""Packed rows of training, with the verifier's states."""

from dataclasses import dataclass, fields

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
    aux_hidden_states: Float[Tensor, "batch seq aux_hidden"]
    """Aux hidden states, ascending by layer, side by side."""
    last_hidden_states: Float[Tensor, "batch seq hidden"]
    """States after all layers, before the final norm."""

    def __post_init__(self) -> None:
        if self.input_ids.shape[0] != 1:
            raise ValueError(f"a batch is one packed row, found {self.input_ids.shape[0]} rows")

    def to(
        self, dtype: torch.dtype | None = None, device: str | torch.device | None = None
    ) -> "Batch":
        """The same rows, all on this device, with states of this type."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        for name in ("aux_hidden_states", "last_hidden_states"):
            moved[name] = moved[name].to(dtype=dtype)
        return Batch(**moved)
