"""The drafts of a measurement: found, read, checked."""

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from benchmarks.acceptance.engines import Kind
from speculators_core.decoding.independent import check_shared_vocabulary
from speculators_core.errors import UnreadFormatError
from speculators_core.format import checkpoint
from speculators_core.format.foreign import foreign_format
from speculators_core.format.stored_speculator import StoredSpeculator
from speculators_core.verifier.pair import Pair
from speculators_core.verifier.reading import read_verifier_config
from speculators_vllm import offline
from speculators_vllm.plugin.speculative_config import check_served

logger = logging.getLogger(__name__)

YARDSTICK_K = 3
"""Tokens that a draft proposes in one step where neither it nor the caller states a number."""
WITHOUT_WEIGHTS: tuple[Kind, ...] = ("prompt-lookup", "assisted")
"""Drafts that are methods: their kind is their name."""


@dataclass(frozen=True)
class FoundDraft:
    """A draft within reach, and what was read of it."""

    kind: Kind
    name: str
    default_k: int
    folder: Path | None = None
    """Folder with its weights; None for a draft that has none here."""
    speculator: StoredSpeculator | None = None
    language_model: PretrainedConfig | None = None

    @property
    def verifier(self) -> str | None:
        """The verifier that it names."""
        return None if self.speculator is None else self.speculator.config.located_verifier

    def check(self, verifier: str, verifier_config: PretrainedConfig, for_vllm: bool) -> None:
        """Raises SpeculatorError unless the draft is whole and made for this verifier.

        A form that vLLM alone reads is left to it, with a warning.
        """
        if self.speculator is not None:
            try:
                Pair.join(self.speculator, verifier, verifier_config)
            except UnreadFormatError as error:
                if not for_vllm:
                    raise
                logger.warning("vLLM runs the draft unchecked. %s", error)
        elif self.language_model is not None:
            check_shared_vocabulary(self.language_model, self.name, verifier_config, verifier)


def find_draft(name: str, for_vllm: bool) -> FoundDraft:
    """The draft of this name: a method that needs no weights, a speculator or a language model.

    Raises:
        SpeculatorError: there is no such draft, or it is to run on vLLM, which cannot serve it.
    """
    for kind in WITHOUT_WEIGHTS:
        if name == kind:
            return FoundDraft(kind, name, YARDSTICK_K)
    raw = checkpoint.fetch_config(name)
    if foreign := foreign_format(raw):
        raise UnreadFormatError(f"{name}: {foreign.describe(name)}")
    if not checkpoint.is_speculator(raw) and "model_type" in raw:
        folder, config = checkpoint.fetch(name), read_verifier_config(name)
        return FoundDraft("language-model", name, YARDSTICK_K, folder, language_model=config)
    speculator = StoredSpeculator.open(name)
    if for_vllm:
        check_served(name, speculator.raw, with_plugin=offline.has_plugin())
    default_k = speculator.config.proposal.speculative_tokens
    return FoundDraft("speculator", name, default_k, speculator.folder, speculator)
