"""The verifier beside a draft, whole or its head."""

from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch
from transformers import PreTrainedModel

from speculators_core.errors import SpeculatorError, first_line
from speculators_core.verifier.head import VerifierHead
from speculators_core.verifier.proof import check_head
from speculators_core.verifier.quantization import unpack
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
            check_head(unpack(verifier))
            return cls(VerifierHead(verifier), verifier.eval() if mode == "full" else None)
        head = read_verifier_head(verifier, dtype, trust_remote_code)
        return cls(head.to(device).eval())

    @property
    def verifier(self) -> PreTrainedModel | VerifierHead:
        """All of the verifier, or the parts that are here."""
        return self.whole or self.head

    def set_attention(self, implementation: str) -> None:
        """Has the verifier's layers attend by one of Transformers' implementations.

        Raises:
            SpeculatorError: Transformers does not have it, or its package is missing.
        """
        try:
            if self.whole is not None:
                self.whole.set_attn_implementation(implementation)
        except (ImportError, ValueError) as error:
            raise SpeculatorError(
                f"attn_implementation {implementation!r}: {first_line(error)}"
            ) from error

    def move(self, device: torch.device) -> None:
        """Moves the verifier, or its head."""
        for module in filter(None, (self.whole, self.head)):
            module.to(device)
