"""A speculator and its verifier: read once, compared, checked."""

from collections.abc import Collection
from dataclasses import dataclass
from os import PathLike
from typing import Self

from transformers import PretrainedConfig

from speculators_core.errors import SpeculatorError
from speculators_core.format import checkpoint
from speculators_core.format.checkpoint import HubOptions
from speculators_core.format.stored_speculator import StoredSpeculator
from speculators_core.verifier.fit import check_tokenizer, check_verifier
from speculators_core.verifier.reading import read_verifier_config


@dataclass(frozen=True)
class Pair:
    """A speculator whose files are sound, and a verifier that it fits."""

    speculator: StoredSpeculator
    verifier: str
    """Hub id or folder."""
    verifier_config: PretrainedConfig
    ignored_tensors: tuple[str, ...] = ()
    """Tensors of the speculator's files that such a draft does not need."""

    @classmethod
    def open(
        cls,
        speculator: str | PathLike,
        verifier: str | None = None,
        *,
        verifier_config: PretrainedConfig | None = None,
        tokenizer: str | None = None,
        has_weights: bool = True,
        files: Collection[str] = checkpoint.ALL_FILES,
        hub: HubOptions | None = None,
    ) -> Self:
        """Fetches a speculator and joins it to a verifier; see `join`.

        Raises:
            SpeculatorError: one of the two is not within reach, the speculator is at fault, or
                they do not fit. `SpeculatorError.cause` is set where the speculator is at fault.
        """
        stored = StoredSpeculator.open(speculator, files, hub)
        return cls.join(stored, verifier, verifier_config, tokenizer, has_weights)

    @classmethod
    def join(
        cls,
        speculator: StoredSpeculator,
        verifier: str | None = None,
        verifier_config: PretrainedConfig | None = None,
        tokenizer: str | None = None,
        has_weights: bool = True,
    ) -> Self:
        """Compares a speculator with a verifier, and reads all of its tensors once.

        Args:
            verifier: the one that the speculator names where None.
            verifier_config: read from the verifier where None.
            tokenizer: served in place of the verifier's.
            has_weights: False leaves the speculator's tensors unread.

        Raises:
            SpeculatorError: as `open`.
        """
        name = verifier or speculator.verifier
        config = verifier_config or (
            read_verifier_config(name) if verifier else config_of_named_verifier(speculator)
        )
        check_verifier(speculator.config, config, name)
        trained_with = speculator.config.located_verifier
        check_tokenizer(speculator.folder, trained_with, tokenizer or name)
        ignored = speculator.check_tensors() if has_weights else []
        return cls(speculator, name, config, tuple(ignored))


def config_of_named_verifier(speculator: StoredSpeculator) -> PretrainedConfig:
    """The config of the verifier that the speculator names, which may be another machine's path.

    Raises:
        SpeculatorError: it names none, or the one that it names cannot be read.
    """
    try:
        return read_verifier_config(speculator.verifier)
    except SpeculatorError as error:
        reason = str(error).partition(". ")[0]
        raise SpeculatorError(
            f"{speculator.name} names the verifier {speculator.verifier}, which cannot be read "
            f"({reason}). Pass --verifier, the folder or hub id of the model that it was trained "
            "for."
        ) from error
