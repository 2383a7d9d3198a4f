"""A speculator's weights between folder and model.

The model that the config names, built without memory, decides what a folder must hold.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speculators_core.errors import SpeculatorError, UnreadFormatError, WrongTypeError
from speculators_core.format import checkpoint
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.registry import MODELS

logger = logging.getLogger(__name__)

QUANTIZED_AT_START = ("bitsandbytes", "torchao")
"""Methods by which vLLM quantizes plain tensors itself."""


class Weights:
    """The tensors of a folder, or of a ``state_dict`` in its place; read when asked for.

    Raises:
        SpeculatorError: a file or a tensor is missing, too much, or of another shape.
        UnreadFormatError: the weights are quantized, pickled or fused.
    """

    def __init__(
        self,
        config: SpeculatorModelConfig,
        folder: Path | None,
        state_dict: Mapping[str, Tensor] | None = None,
        ignore_mismatched_sizes: bool = False,
    ):
        assert folder is not None or state_dict is not None
        if state_dict is not None:
            _check_tensors_by_name(state_dict)
        self._state_dict = state_dict
        self._stored = {}
        if folder is not None and state_dict is None:
            self._stored = checkpoint.stored_tensors(folder)
        found = self._stored if state_dict is None else state_dict
        with torch.device("meta"):
            model = MODELS.load(config.speculators_model_type)(config)
        where = folder if folder is not None and state_dict is None else "state_dict"
        self._names = {_as_ours(name, model.aliases): name for name in found}
        for name in found:
            ours = _as_ours(name, model.aliases)
            if ours != name and ours in found:
                raise SpeculatorError(
                    f"{where}: {name} and {ours} are two names of one tensor, expected one of "
                    "them. Remove the one that was not trained.",
                    cause="damaged checkpoint",
                )
        shapes = {ours: tuple(found[name].shape) for ours, name in self._names.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.ignored = sorted(
            name
            for name in shapes
            if name not in wanted
            and (
                name in model.unneeded
                or checkpoint.LEFTOVERS.fullmatch(name)
                or (name == "d2t" and self._maps_nothing())
            )
        )
        """Tensors of the folder that this kind of draft does not need; they are not read."""
        for name in self.ignored:
            del shapes[name], self._names[name]
        wanted |= {name: shape for name, shape in model.adoptable.items() if name in shapes}
        self.adopted = sorted(set(model.adoptable) & set(shapes))
        """Tensors in place of the verifier's, which the model has a place for when it is told."""
        if folder is not None and state_dict is None and not wanted.keys() >= shapes.keys():
            check_plain(config, folder)
        self.mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        """Tensors that are left out, with the shape found and the one that the model has."""
        if ignore_mismatched_sizes:
            self._leave_out_mismatched(shapes, wanted, where)
        model.check_shapes(shapes, where)
        checkpoint.check_shapes(shapes, wanted, where, (*model.optional, *self.mismatched))
        keep_random = self.mismatched.keys() - set(model.from_verifier)
        self.missing = set(wanted) - set(shapes) - keep_random
        """Tensors of the model that are not here."""

    def _maps_nothing(self) -> bool:
        """Whether ``d2t`` maps each token to itself, as release 0.3 writes it for all tokens."""
        if self._state_dict is not None:
            return not self._state_dict[self._names["d2t"]].any()
        stored = {"d2t": self._stored[self._names["d2t"]]}
        return not any(tensor.any() for _, tensor in checkpoint.read_tensors(stored, ["d2t"]))

    def _leave_out_mismatched(
        self,
        shapes: dict[str, tuple[int, ...]],
        wanted: Mapping[str, tuple[int, ...]],
        where: object,
    ) -> None:
        for name in sorted(shapes.keys() & wanted.keys()):
            if shapes[name] != wanted[name]:
                self.mismatched[name] = shapes.pop(name), wanted[name]
                del self._names[name]
        if self.mismatched:
            logger.warning(
                "%s: tensors of another shape were left out and start at random: %s",
                where,
                ", ".join(
                    f"{name} {list(found)} instead of {list(expected)}"
                    for name, (found, expected) in self.mismatched.items()
                ),
            )

    @property
    def loading_info(self) -> dict[str, Any]:
        """What Transformers returns with ``output_loading_info``."""
        return {
            "missing_keys": set(self.missing),
            "unexpected_keys": set(self.ignored),
            "mismatched_keys": {(name, *shapes) for name, shapes in self.mismatched.items()},
            "error_msgs": [],
        }

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """One tensor after another.

        Raises:
            SpeculatorError: one holds a NaN or an infinity, or values of the wrong kind.
        """
        if self._state_dict is not None:
            for ours, name in self._names.items():
                checkpoint.check_values(ours, self._state_dict[name], "state_dict")
                yield ours, self._state_dict[name]
            return
        stored = {ours: self._stored[name] for ours, name in self._names.items()}
        yield from checkpoint.read_tensors(stored, list(stored))


def _check_tensors_by_name(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise WrongTypeError(
            f"state_dict is a {type(state_dict).__name__}; expected tensors by name. Pass what a "
            "model's state_dict() returns."
        )
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            found = "a tensor without values" if isinstance(tensor, Tensor) else repr(tensor)[:80]
            raise WrongTypeError(
                f"state_dict holds {found} as {name}; expected a tensor. Pass what a model's "
                "state_dict() returns."
            )


def names_of(tensors: Sequence[str]) -> str:
    """The first names of several, and how many others there are."""
    others = len(tensors) - 4
    return ", ".join(tensors[:4]) + (f" and {others} others" if others > 0 else "")


def _as_ours(name: str, aliases: Mapping[str, str]) -> str:
    """A tensor's name in the format, where other writers have another for it."""
    for theirs, ours in aliases.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def check_plain(config: SpeculatorModelConfig, folder: Path) -> None:
    """Raises UnreadFormatError where a quantization accounts for unknown tensors."""
    layer_config = config.transformer_layer_config
    stated = {
        f"transformer_layer_config.{key}": getattr(layer_config, key, None)
        for key in checkpoint.QUANTIZATION_KEYS
    }
    stated["quantization_config"] = config.unread_keys.get("quantization_config")
    stated["hf_quant_config.json"] = (folder / "hf_quant_config.json").exists()
    for place, settings in stated.items():
        if not settings:
            continue
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        raise UnreadFormatError(
            f"{folder}: the draft is quantized ({place}{f', {method}' if method else ''}), which "
            "vLLM reads and this package does not. Use the draft that it was made from."
        )


def claimed_quantization(config: SpeculatorModelConfig) -> str | None:
    """The key, and the method, by which vLLM would take plain tensors for quantized ones."""
    for key in checkpoint.QUANTIZATION_KEYS:
        stated = getattr(config.transformer_layer_config, key, None)
        method = stated.get("quant_method") if isinstance(stated, Mapping) else None
        if stated and method not in QUANTIZED_AT_START:
            return f"transformer_layer_config.{key}" + (f" ({method})" if method else "")
    return None


def check_checkpoint(folder: Path, config: SpeculatorModelConfig) -> list[str]:
    """Reads every tensor once and keeps none but the vocabulary maps; names the ignored ones.

    Raises:
        SpeculatorError: a file or a tensor is missing, of another shape, or not finite; or
            tensors contradict each other, or a quantization that the config states.
        UnreadFormatError: the weights are quantized, pickled or fused.
    """
    weights = Weights(config, folder)
    claim = claimed_quantization(config)
    if claim is not None:
        raise SpeculatorError(
            f"{folder}: {claim} states quantized tensors, but they are plain: vLLM would load them "
            f"as what they are not. Remove the key from {checkpoint.CONFIG}.",
            cause="invalid config",
        )
    maps = {name: tensor for name, tensor in weights.read() if not tensor.is_floating_point()}
    MODELS.load(config.speculators_model_type).check_tensors(maps)
    return weights.ignored


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
    for key in checkpoint.QUANTIZATION_KEYS:  # of a verifier: a model's tensors are plain
        written["transformer_layer_config"].pop(key, None)
    name, located = config.verifier.name_or_path, config.located_verifier
    if name is not None and located is not None and not Path(name).is_absolute():
        is_moved = (Path(folder) / name).resolve() != Path(located).resolve()
        if Path(located).is_dir() and is_moved:
            written["speculators_config"]["verifier"]["name_or_path"] = located
    checkpoint.write_checkpoint(folder, written, tensors, max_shard_size)
