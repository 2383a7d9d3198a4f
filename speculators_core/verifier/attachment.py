"""The verifier beside a draft, whole or its head."""

from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch
from transformers import PreTrainedModel

from speculators_core.verifier.head import VerifierHead
from speculators_core.verifier.proof import check_head
from speculators_core.verifier.reading import load_verifier, read_verifier_head

NamedVerifier = str | PathLike | PreTrainedModel
"""A verifier in memory, its folder, or its hub id."""


@dataclass(frozen=True)
class Attachment:
    """A verifier beside a draft. It is not a module, so that PyTorch keeps the two apart."""

    head: VerifierHead
    whole: PreTrainedModel | None = None

    @classmethod
    def of(
        cls,
        verifier: str | PreTrainedModel,
        mode: Literal["full", "train_only"],
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool,
    ) -> "Attachment":
        """All of the verifier, or for training only its norm, head and embeddings.

        Raises:
            SpeculatorError: it cannot be read, or its logits are not rebuilt from its head.
        """
        if mode == "full" and not isinstance(verifier, PreTrainedModel):
            verifier = load_verifier(verifier, dtype, trust_remote_code).to(device)
        if isinstance(verifier, PreTrainedModel):
            check_head(verifier)
            return cls(VerifierHead(verifier), verifier.eval() if mode == "full" else None)
        head = read_verifier_head(verifier, dtype, trust_remote_code)
        return cls(head.to(device).eval())

    def move(self, device: torch.device) -> None:
        """Moves the verifier, or its head."""
        for module in filter(None, (self.whole, self.head)):
            module.to(device)
