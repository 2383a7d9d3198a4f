"""A speculator's folder: fetched and read once."""

from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self

from speculators_core.errors import SpeculatorError, UnreadFormatError
from speculators_core.format import checkpoint
from speculators_core.format.checkpoint import HubOptions, RawConfig
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.format.loading import check_checkpoint


@dataclass(frozen=True)
class StoredSpeculator:
    """A speculator on disk, with its config as written and as checked."""

    name: str
    """Folder or hub id that it was opened by."""
    folder: Path
    raw: RawConfig
    config: SpeculatorModelConfig

    @classmethod
    def open(
        cls,
        name: str | PathLike,
        files: Collection[str] = checkpoint.ALL_FILES,
        hub: HubOptions | None = None,
    ) -> Self:
        """Fetches a speculator's files and reads its config; no tensor is read.

        Raises:
            SpeculatorError: there is no such speculator within reach, or its config is invalid.
        """
        folder = checkpoint.fetch(name, files, hub)
        raw = checkpoint.read_config(folder)
        config = SpeculatorModelConfig.of_folder(folder, deepcopy(raw))
        config.name_or_path = str(folder)
        return cls(str(name), folder, raw, config)

    @property
    def verifier(self) -> str:
        """The verifier that the config names; a folder beside the speculator as a full path.

        Raises:
            SpeculatorError: the config names none.
        """
        located = self.config.located_verifier
        if located is None:
            raise SpeculatorError(
                f"{self.name} names no verifier (name_or_path is "
                f"{self.config.verifier.name_or_path!r}). Pass --verifier, the folder or hub id of "
                "the model that it was trained for."
            )
        return located

    def check_tensors(self) -> list[str]:
        """Reads every tensor once and keeps none; names those that the draft does not need.

        Raises:
            SpeculatorError: a file or a tensor is missing, of another shape, or not finite; or
                tensors contradict each other; or vLLM would not know the config as a speculator's.
            UnreadFormatError: the weights are in a form that this package does not read.
        """
        if "model_type" in self.raw:
            raise SpeculatorError(
                f"{self.folder / checkpoint.CONFIG}: model_type {self.raw['model_type']!r} hides "
                "the speculator from vLLM, which takes it for a language model; expected none at "
                "the top level. Remove the key.",
                cause="invalid config",
            )
        try:
            return check_checkpoint(self.folder, self.config)
        except UnreadFormatError:
            raise
        except SpeculatorError as error:
            error.cause = error.cause or "damaged checkpoint"
            raise
