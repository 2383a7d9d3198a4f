"""The verifier beside a draft: attached, read and detached."""

import logging
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators_core.batch import Batch
from speculators_core.errors import SpeculatorError
from speculators_core.format.checkpoint import ALL_FILES, HubOptions, fetch
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.verifier.attachment import Attachment, NamedVerifier
from speculators_core.verifier.fit import check_verifier
from speculators_core.verifier.head import VerifierHead, VerifierLogits
from speculators_core.verifier.reading import load_verifier, verifier_config_of, with_head

logger = logging.getLogger(__name__)

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
            self.attach_verifier(verifier, mode)

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

    def resolve_verifier(self, verifier: NamedVerifier | None = None) -> PreTrainedModel:
        """The attached verifier; or else the given one, or the one that the config names, loaded.

        Raises:
            SpeculatorError: none is named, it cannot be read, or it is not the one that the draft
                was made for.
        """
        if self.attached is not None and self.attached.whole is not None:
            return self.attached.whole
        named = self._named(verifier)
        check_verifier(self.config, verifier_config_of(named))
        if isinstance(named, PreTrainedModel):
            return with_head(named)
        return load_verifier(named, self.dtype).to(self.device)

    def _named(self, verifier: NamedVerifier | None = None) -> str | PreTrainedModel:
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
        mode: Literal["full", "train_only"] | None = None,
        trust_remote_code: bool = False,
    ) -> PreTrainedModel | VerifierHead:
        """Brings the verifier to the draft: all of it, or only its norm, head and embeddings.

        A stack of layers without a head, as ``AutoModel`` loads it, gets the one of its
        embeddings or of its checkpoint. Without a mode the verifier is attached in full.

        Returns:
            The verifier; in the mode ``train_only``, of one that was read for it, these parts.

        Raises:
            SpeculatorError: it cannot be read, or it is not the one that the draft was made for.
        """
        mode = mode or "full"
        if mode not in ("full", "train_only"):
            raise ValueError(
                f"the mode in which a verifier is attached is {mode!r}, expected 'full' or "
                "'train_only'; 'detached' is for from_pretrained and constructors"
            )
        named = self._named(verifier)
        check_verifier(self.config, verifier_config_of(named, trust_remote_code))
        if isinstance(named, PreTrainedModel):
            named = with_head(named)
        self.attached = Attachment.of(named, mode, self.dtype, self.device, trust_remote_code)
        if self.attached.whole is not None and self.attached.whole.can_generate():
            self.generation_config = self.attached.whole.generation_config
        self.fill_unset()
        return named if isinstance(named, PreTrainedModel) else self.attached.verifier

    def attach_loaded(
        self,
        verifier: NamedVerifier | None,
        mode: AttachmentMode | None,
        hub: HubOptions,
        trust_remote_code: bool,
        attn_implementation: str | None,
    ) -> None:
        """Attaches the verifier that `from_pretrained` was asked for, or the config names.

        Without a verifier and a mode one that cannot be loaded is left out, with a warning.

        Raises:
            SpeculatorError: the verifier was asked for, or the draft's tensors need it, and it
                cannot be read.
        """
        is_asked_for = verifier is not None or mode is not None
        if is_asked_for and mode != "detached":
            self.attach_verifier(self._fetched(verifier, hub), mode, trust_remote_code)
        elif not is_asked_for and self.config.located_verifier is not None:
            try:
                self.attach_verifier(self._fetched(None, hub), "full", trust_remote_code)
            except SpeculatorError as error:
                logger.warning(
                    "the draft was loaded without its verifier, which could not be attached: %s",
                    error,
                )
        if self.unset & set(self.from_verifier):
            self.attach_verifier(self._fetched(verifier, hub), "train_only", trust_remote_code)
            self.detach_verifier()
        self.fill_unset()
        is_ours = self.attached is not None and not isinstance(verifier, PreTrainedModel)
        if attn_implementation is not None and is_ours:
            assert self.attached is not None
            self.attached.set_attention(attn_implementation)

    def _fetched(self, verifier: NamedVerifier | None, hub: HubOptions) -> NamedVerifier | None:
        """The verifier, from the cache alone where ``hub`` does not allow more."""
        named = self._named(verifier)
        if isinstance(named, PreTrainedModel) or not hub.local_files_only:
            return verifier
        return fetch(named, (*ALL_FILES, "*.py"), HubOptions(hub.cache_dir, local_files_only=True))

    def load_verifier_weights(self) -> None:
        """Attaches norm, head and embeddings of the verifier that the config names, if none is.

        Raises:
            SpeculatorError: none is named, or it cannot be read.
        """
        if self.attached is None:
            self.attach_verifier(None, "train_only")

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
