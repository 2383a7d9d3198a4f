"""A speculator's weights between folder and model.

The model that the config names, built without memory, decides what a folder must hold.
"""

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from speculators_core.format import checkpoint
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.registry import MODELS


class Weights:
    """The tensors of a folder, or of a ``state_dict`` in its place; read when asked for.

    Raises:
        SpeculatorError: a file or a tensor is missing, too much, or of another shape.
    """

    def __init__(
        self,
        config: SpeculatorModelConfig,
        folder: Path,
        state_dict: Mapping[str, Tensor] | None = None,
    ):
        self._state_dict = state_dict
        self._stored = checkpoint.stored_tensors(folder) if state_dict is None else {}
        found = self._stored if state_dict is None else state_dict
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        with torch.device("meta"):
            model = MODELS.load(config.speculators_model_type)(config)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        where = folder if state_dict is None else "state_dict"
        checkpoint.check_shapes(shapes, wanted, where, model.optional)
        self.missing = set(wanted) - set(shapes)
        """Tensors of the model that are not here."""

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """One tensor after another.

        Raises:
            SpeculatorError: one holds a NaN or an infinity, or values of the wrong kind.
        """
        if self._state_dict is not None:
            return iter(self._state_dict.items())
        return checkpoint.read_tensors(self._stored, list(self._stored))


def check_checkpoint(folder: Path, config: SpeculatorModelConfig) -> None:
    """Reads every tensor once and keeps none but the vocabulary maps.

    Raises:
        SpeculatorError: a file or a tensor is missing, of another shape, or not finite; or
            tensors contradict each other.
    """
    weights = Weights(config, folder)
    maps = {name: tensor for name, tensor in weights.read() if not tensor.is_floating_point()}
    MODELS.load(config.speculators_model_type).check_tensors(maps)


def write(
    folder: str | PathLike,
    config: SpeculatorModelConfig,
    tensors: Mapping[str, Tensor],
    max_shard_size: str | int,
) -> None:
    """Writes the checkpoint; files replace older ones when all are whole.

    A verifier that was named relative to the folder it was read from stays reachable.
    """
    written = config.to_dict()
    name, located = config.verifier.name_or_path, config.located_verifier
    if name is not None and located is not None and not Path(name).is_absolute():
        is_moved = (Path(folder) / name).resolve() != Path(located).resolve()
        if Path(located).is_dir() and is_moved:
            written["speculators_config"]["verifier"]["name_or_path"] = located
    checkpoint.write_checkpoint(folder, written, tensors, max_shard_size)
