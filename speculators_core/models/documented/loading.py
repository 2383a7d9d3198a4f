"""Arguments of `from_pretrained` as Transformers has them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from speculators_core.errors import SpeculatorError, WrongTypeError, first_line
from speculators_core.format import checkpoint
from speculators_core.format.checkpoint import HubOptions
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.models.verifier_side import AttachmentMode
from speculators_core.verifier.attachment import NamedVerifier


@dataclass(frozen=True)
class LoadingOptions:
    """How a draft is loaded, beside what it is loaded from."""

    dtype: str | torch.dtype = "auto"
    device: torch.device | None = None
    attn_implementation: str | None = None
    """Attention of the verifier that is loaded with the draft; the draft has one kind."""
    has_info: bool = False
    """Return the names of tensors that were missing or of another shape, too."""

    @classmethod
    def take(
        cls,
        arguments: checkpoint.RawConfig,
        dtype: str | torch.dtype,
        use_safetensors: bool | None,
        weights_only: bool,
    ) -> "LoadingOptions":
        """Removes the options from the arguments; what is left are keys of the config.

        Raises:
            SpeculatorError: one asks for what is never done here.
        """
        if use_safetensors is False:
            raise SpeculatorError(
                "use_safetensors=False asks for pickled weights, which are never read here. "
                "Convert the checkpoint to safetensors and leave the argument out."
            )
        if not weights_only:
            raise SpeculatorError(
                "weights_only=False allows pickled objects, which are never read here. "
                "Leave the argument out."
            )
        arguments.pop("low_cpu_mem_usage", None)  # tensors are read one after another, always
        named = arguments.pop("torch_dtype", None)
        if named is not None and dtype not in ("auto", named):
            raise SpeculatorError(f"torch_dtype {named} contradicts dtype {dtype}; pass dtype.")
        return cls(
            dtype if named is None else named,
            _device(arguments.pop("device_map", None)),
            arguments.pop("attn_implementation", None),
            bool(arguments.pop("output_loading_info", False)),
        )


def _device(device_map: object) -> torch.device | None:
    """The one device of a draft."""
    if device_map is None:
        return None
    if isinstance(device_map, dict):
        devices = list(device_map.values())
        if any(device != devices[0] for device in devices[1:]) or not devices:
            raise SpeculatorError(
                f"device_map {device_map} divides the draft; expected one device for all of it."
            )
        device_map = devices[0]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device_map)  # type: ignore[call-overload]  # judged here
    except (RuntimeError, TypeError) as error:
        raise SpeculatorError(
            f"device_map {device_map!r} is not a device; expected auto, cpu, cuda or cuda:<n>."
        ) from error
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # an assertion where PyTorch has no CUDA
        raise SpeculatorError(
            f"device_map {device_map!r} is not on this machine: {first_line(error)}. Choose "
            "another device, such as cpu."
        ) from error


def constructor_arguments(
    model_args: Sequence[Any],
    verifier: NamedVerifier | None,
    mode: AttachmentMode | None,
) -> tuple[NamedVerifier | None, AttachmentMode | None]:
    """Verifier and mode, which positional arguments may give in this order."""
    if len(model_args) > 2 or (model_args and verifier is not None):
        raise SpeculatorError(
            f"found {len(model_args)} positional arguments after the folder; a speculator takes "
            "verifier and verifier_attachment_mode, once each."
        )
    given = [*model_args, None, None]
    return verifier or given[0], mode or given[1]


def open_config(
    name: str | PathLike | None,
    config: PretrainedConfig | str | PathLike | None,
    has_weights: bool,
    hub: HubOptions,
    changes: checkpoint.RawConfig,
) -> tuple[Path | None, SpeculatorModelConfig]:
    """The folder that holds the weights, if any, and the config.

    Args:
        name: folder or hub id of the speculator.
        config: an object, a folder, a file or a hub id; the speculator's where None.
        has_weights: the caller has the weights, so that a folder may lack them.
        changes: keys of the config that are replaced.

    Raises:
        SpeculatorError: something is missing, or not what it should be.
    """
    source: str | PathLike | None = None
    if config is not None and not isinstance(config, PretrainedConfig):
        if not isinstance(config, str | PathLike):
            raise WrongTypeError(
                f"config is a {type(config).__name__}; expected a SpeculatorModelConfig, a folder, "
                "a file or a hub id. SpeculatorModelConfig.from_dict makes one from a dict."
            )
        source = config
        if name is None and not has_weights:
            name = Path(source).parent if Path(source).is_file() else source
    folder = None
    if name is not None:
        files = [checkpoint.CONFIG] if has_weights else checkpoint.ALL_FILES
        folder = checkpoint.fetch(name, files, hub)
    elif config is None:
        raise SpeculatorError("from_pretrained has nothing to load: pass a folder or a config.")
    elif not has_weights:
        raise SpeculatorError(
            "from_pretrained has a config and no weights: pass a folder or state_dict. For a "
            "fresh draft call the model's class."
        )
    if source is not None and Path(source).is_file():
        opened = SpeculatorModelConfig.from_pretrained(source, **changes)
    elif source is not None or not isinstance(config, PretrainedConfig):
        place = folder if source is None else checkpoint.fetch(source, [checkpoint.CONFIG], hub)
        assert place is not None
        opened = SpeculatorModelConfig.from_pretrained(place, **changes)
    elif not isinstance(config, SpeculatorModelConfig):
        raise WrongTypeError(
            f"config is a {type(config).__name__}; expected a SpeculatorModelConfig."
        )
    elif changes:
        key = next(iter(changes))
        raise SpeculatorError(f"{key!r} has no effect beside a config object. Set it there.")
    else:
        opened = copy.deepcopy(config)  # its name becomes the folder's
    if folder is not None:
        opened.name_or_path = str(folder)
    return folder, opened
