"""The verifier beside a draft: attached, read and detached."""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators_core.batch import Batch
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.verifier.attachment import Attachment, NamedVerifier
from speculators_core.verifier.fit import check_verifier
from speculators_core.verifier.head import VerifierHead, VerifierLogits
from speculators_core.verifier.reading import verifier_config_of

AttachmentMode = Literal["detached", "full", "train_only"]


class VerifierSide(PreTrainedModel):
    """The part of a speculator that deals with its verifier.

    The verifier is held beside the model, not in it: ``parameters``, ``state_dict``, ``to`` and
    ``save_pretrained`` know the draft alone.
    """

    config: SpeculatorModelConfig

    def __init__(
        self,
        config: SpeculatorModelConfig,
        verifier: NamedVerifier | None = None,
        verifier_attachment_mode: AttachmentMode | None = None,
    ):
        super().__init__(config)
        self.attached: Attachment | None = None
        self.unset: set[str] = set()
        """Tensors that hold no trained value yet: neither loaded nor taken from a verifier."""
        self._requested = (verifier, attachment_mode(verifier, verifier_attachment_mode))

    def post_init(self) -> None:
        """Every algorithm calls it at the end of its ``__init__``."""
        super().post_init()
        verifier, mode = self._requested
        del self._requested
        if mode != "detached":
            self.attach_verifier(self.resolve_verifier(verifier), mode)

    def enable_input_require_grads(self) -> None:
        """Does nothing: layers recompute without reentrance, so embeddings need no gradient."""

    def get_input_embeddings(self) -> nn.Embedding | None:
        """The draft's embeddings; None where it reads its verifier's."""
        return None

    def get_output_embeddings(self) -> nn.Linear | None:
        """The draft's head; None where it reads its verifier's."""
        return None

    @property
    def verifier(self) -> PreTrainedModel:
        """The verifier attached in full.

        Raises:
            SpeculatorError: there is none.
        """
        if self.attached is not None and self.attached.whole is not None:
            return self.attached.whole
        raise SpeculatorError(
            "no verifier is attached in full. Call attach_verifier(verifier, mode='full') first."
        )

    @property
    def verifier_head(self) -> VerifierHead:
        """The attached verifier's final norm and head.

        Raises:
            SpeculatorError: no verifier is attached.
        """
        if self.attached is None:
            raise SpeculatorError("no verifier is attached. Call attach_verifier(verifier) first.")
        return self.attached.head

    def verifier_logits(self, batch: Batch) -> VerifierLogits:
        """The verifier's logits in each row of a batch, made when they are asked for."""
        head, states = self.verifier_head, batch.last_hidden_states[0]
        return lambda rows: head(states[rows])

    def embed_as_verifier(
        self, token_ids: Int[Tensor, "*tokens"]
    ) -> Float[Tensor, "*tokens hidden"]:
        """The verifier's embeddings, for drafts that have none."""
        table = self.verifier_head.embed_tokens.weight.detach()
        embedded = nn.functional.embedding(token_ids.to(table.device), table)
        return embedded.to(self.device, self.dtype)

    @property
    def head_weight(self) -> Float[Tensor, "draft_vocab hidden"]:
        """The head's weight: the draft's, or its verifier's for drafts that have none."""
        own = self.get_output_embeddings()
        weight = self.verifier_head.lm_head.weight.detach() if own is None else own.weight
        return weight.to(self.device, self.dtype)

    def resolve_verifier(self, verifier: NamedVerifier | None = None) -> str | PreTrainedModel:
        """The given verifier, or the one that the config names.

        Raises:
            SpeculatorError: neither names one.
        """
        if isinstance(verifier, PreTrainedModel):
            return verifier
        if verifier is not None:
            return str(verifier)
        located = self.config.located_verifier
        if located is None:
            raise SpeculatorError("the config names no verifier. Pass verifier=<hub id or folder>.")
        return located

    def attach_verifier(
        self,
        verifier: NamedVerifier | None = None,
        mode: Literal["full", "train_only"] = "full",
        trust_remote_code: bool = False,
    ) -> None:
        """Brings the verifier to the draft: all of it, or only its norm, head and embeddings.

        Raises:
            SpeculatorError: it cannot be read, or it is not the one that the draft was made for.
        """
        if mode not in ("full", "train_only"):
            raise ValueError(f"mode must be 'full' or 'train_only', found {mode!r}")
        resolved = self.resolve_verifier(verifier)
        check_verifier(self.config, verifier_config_of(resolved, trust_remote_code))
        self.attached = Attachment.of(resolved, mode, self.dtype, self.device, trust_remote_code)
        self.fill_unset()

    def detach_verifier(self) -> None:
        """Releases the verifier, and its memory where nothing else holds it."""
        self.attached = None

    @property
    def from_verifier(self) -> tuple[str, ...]:
        """Tensors that a checkpoint may leave out, because the verifier has them."""
        return ()

    def fill_unset(self) -> None:
        """Gives every tensor in ``unset`` its value, where its source is at hand."""


def attachment_mode(verifier: NamedVerifier | None, mode: AttachmentMode | None) -> AttachmentMode:
    """The mode as given; without one a given verifier is attached in full."""
    return mode or ("detached" if verifier is None else "full")
