"""Finds, reads, checks and writes checkpoint folders.

A folder holds ``config.json`` and ``model.safetensors``, or shards and their index. Headers are
checked before any tensor is read; what is written goes to a temporary name first.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speculators_core.errors import Cause, SpeculatorError, UnreadFormatError, first_line
from speculators_core.files import make_folder, read_json, replaced_files, write_text

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FOREIGN_KEYS = {
    "auto_map",
    "speculators_version",
    "has_no_defaults_at_init",
    "inference_type",
    "_name_or_path",
    "model_type",  # at the top it hides a speculator from vLLM
    # Attributes of Transformers' config classes, which releases 0.3 and 0.4 wrote out.
    "attribute_map",
    "base_config_key",
    "base_model_ep_plan",
    "base_model_fsdp_plan",
    "base_model_pp_plan",
    "base_model_tp_plan",
    "keys_to_ignore_at_inference",
    "sub_configs",
}
"""Written by other versions and projects, read by nobody: dropped."""
KEPT_KEYS = {
    "max_anchors",
    "num_depths",
    "down_sample_ratio",
    "down_sample_ratio_min",
    "num_speculative_steps",
    "embed_requires_grad",
    "use_cache",
    "ttt_steps",
    "draft_attn_impl",
    "quantization_config",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "confidence_head_alpha",
    "conv_kernel_size",
    "conv_group_size",
    "selector_rank",
    "selector_top_k",
}
"""Keys that releases of the public library or vLLM know, and none of our networks reads."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Keys of a layer config by which vLLM takes the draft's tensors for quantized ones."""
LAYER_KEYS = {
    "num_aux_hidden_states",
    "num_aux_layers",
    "target_hidden_size",
    "is_neox_style",
    "is_causal",
    "fc_norm",
    "logit_scale",
    "verifier_num_hidden_layers",
}
"""Keys inside ``transformer_layer_config`` that vLLM or we read and Transformers does not."""
COMMON_KEYS = {"name_or_path", "torch_dtype", "attn_implementation", "_commit_hash"}
"""Keys of any Transformers config that are not fields of its class."""
MAP_DTYPES = {"d2t": torch.int64, "t2d": torch.bool}
PICKLE = re.compile(r"(?!optimizer|scheduler|training_|rng_|mask_embedding).*\.(bin|pt|pth)")
"""Files that may hold weights which vLLM reads and this package does not."""
LEFTOVERS = re.compile(
    r"(verifier_norm|verifier_lm_head)\.\w+"
    r"|(.*\.)?rotary_(pos_)?emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)
"""Tensors that other writers leave in a draft's file and no draft reads."""
FUSED = (".qkv_proj.", ".gate_up_proj.")
"""Projections that vLLM's networks keep as one; it reads them from a file too."""
ALL_FILES = (CONFIG, "generation_config.json", "model*.safetensors", INDEX)
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.py")
HEAD_FILES = (CONFIG, INDEX)
"""Enough to know what a checkpoint is, and which of its files holds which tensor."""
RawConfig = dict[str, Any]
"""The content of a ``config.json``."""


def without_foreign_keys(config: Mapping[str, Any]) -> RawConfig:
    return {key: value for key, value in config.items() if key not in FOREIGN_KEYS}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, under what name, and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HubOptions:
    """How files are downloaded from the hub."""

    cache_dir: str | PathLike | None = None
    force_download: bool = False
    local_files_only: bool = False
    token: str | bool | None = None
    revision: str | None = "main"


def fetch(
    name_or_path: str | PathLike,
    files: Collection[str] = ALL_FILES,
    hub: HubOptions | None = None,
) -> Path:
    """The local folder of a checkpoint; of a hub id the files of these names are downloaded.

    Raises:
        SpeculatorError: there is no such folder, or no such repository within reach.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise SpeculatorError(
            f"{folder} is a file; expected the folder that holds {CONFIG}. Pass that folder."
        )
    hub = hub or HubOptions()
    try:
        return Path(
            snapshot_download(
                str(name_or_path),
                allow_patterns=list(files),
                cache_dir=None if hub.cache_dir is None else Path(hub.cache_dir),
                force_download=hub.force_download,
                local_files_only=hub.local_files_only,
                token=hub.token,
                revision=hub.revision,
            )
        )
    except HFValidationError as error:
        raise SpeculatorError(
            f"{name_or_path}: no such folder, and not a hub id. Pass the folder of a checkpoint, "
            "or a hub id such as organization/name."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SpeculatorError(
            f"{name_or_path}: no such folder, and it could not be downloaded from the hub "
            f"({first_line(error)}). Check the name and the connection, or pass a local folder."
        ) from error


def fetch_config(name_or_path: str | PathLike, hub: HubOptions | None = None) -> RawConfig:
    """The ``config.json`` of any checkpoint; nothing else is downloaded.

    Raises:
        SpeculatorError: there is no such checkpoint within reach, or its config is not an object.
    """
    return read_config(fetch(name_or_path, [CONFIG], hub))


def read_config(folder: Path) -> RawConfig:
    """The ``config.json`` of a folder.

    Raises:
        SpeculatorError: the file is missing or is not a JSON object.
    """
    return read_json(folder / CONFIG)


def is_speculator(config: RawConfig) -> bool:
    """Whether a checkpoint states which kind of speculator it is."""
    return "speculators_model_type" in config


def stored_tensors(folder: Path, files: Collection[str] | None = None) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, or of these files of it, from the files' headers alone.

    Raises:
        SpeculatorError: no weights, a shard missing or truncated, or the index names a tensor
            that its shard does not hold.
        UnreadFormatError: the weights are pickled.
    """
    if not (folder / INDEX).exists():
        return _without_index(folder)
    weight_map = {
        name: shard
        for name, shard in read_weight_map(folder).items()
        if files is None or shard in files
    }
    shards = {name: _stored_in(_inside(folder, name)) for name in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise SpeculatorError(
                f"{folder / shard} has no tensor {name}, which {INDEX} expects there. Copy the "
                "checkpoint again, with all its files.",
                cause="damaged checkpoint",
            )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _without_index(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the one file, or of all shards: some writers give one shard and no index."""
    if (folder / WEIGHTS).exists():
        return _stored_in(folder / WEIGHTS)
    stored: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        stored |= _stored_in(file)
    if stored:
        return stored
    if pickled := sorted(file.name for file in folder.glob("*") if _is_pickle(file)):
        raise UnreadFormatError(
            f"{folder}: the weights are pickled ({pickled[0]}), which this package does not read; "
            f"expected {WEIGHTS}. Save them as safetensors."
        )
    return _stored_in(folder / WEIGHTS)


def _is_pickle(file: Path) -> bool:
    """Whether a file's name and its first bytes are those of weights that torch has saved."""
    if not PICKLE.fullmatch(file.name) or not file.is_file():
        return False
    with file.open("rb") as content:
        return content.read(2) in (b"PK", b"\x80\x02")


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor names to files, as the index says.

    Raises:
        SpeculatorError: the index is not such a map.
    """
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise SpeculatorError(
            f"{folder / INDEX}: weight_map does not map tensor names to files, as expected. Copy "
            "it again.",
            cause="damaged checkpoint",
        )
    return weight_map


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name or not name.isprintable() or len(name) > 255:
        raise SpeculatorError(
            f"{folder / INDEX}: found shard {name!r}, expected the name of a file in the same "
            "folder. Copy the checkpoint again.",
            cause="damaged checkpoint",
        )
    return folder / name


def _stored_in(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise SpeculatorError(
            f"{file} is missing or not a file; expected a safetensors file. Copy the checkpoint "
            "again, with all its files.",
            cause="damaged checkpoint",
        )
    try:
        with safe_open(file, "pt") as tensors:
            return {
                name: StoredTensor(file, name, tuple(tensors.get_slice(name).get_shape()))
                for name in tensors.keys()
            }
    except (SafetensorError, OSError) as error:
        raise SpeculatorError(
            f"{file} is truncated or not a safetensors file ({first_line(error)}). Copy it again.",
            cause="damaged checkpoint",
        ) from error


def layer_type(folder: Path) -> str | None:
    """The type of a draft's layers by its tensors: Qwen3's have a norm of q. None if unknown."""
    try:
        names = stored_tensors(folder)
    except SpeculatorError:
        return None
    return "qwen3" if any(name.endswith(".q_norm.weight") for name in names) else "llama"


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    where: str | Path,
    optional: Collection[str] = (),
) -> None:
    """Compares names and shapes with what a model needs.

    Raises:
        SpeculatorError: a tensor is missing, unknown or of another shape; the first is named.
        UnreadFormatError: projections are stored as one.
    """
    if fused := next((n for n in found if n not in expected and any(f in n for f in FUSED)), None):
        raise UnreadFormatError(
            f"{where}: {fused} holds projections as one tensor, which vLLM reads and this package "
            "does not. Save them one by one."
        )
    for name, shape in expected.items():
        if name not in found and name not in optional:
            raise SpeculatorError(
                f"{where}: tensor {name} {list(shape)} is missing, which {CONFIG} requires. Copy "
                f"the checkpoint again, or correct {CONFIG}.",
                cause="missing norm" if "norm" in name else _cause_in(name),
            )
        if name in found and found[name] != shape:
            raise SpeculatorError(
                f"{where}: {name} has shape {list(found[name])}, expected {list(shape)} by "
                f"{CONFIG}. Copy the checkpoint again, or correct {CONFIG}.",
                cause=_cause_in(name),
            )
    for name in found:
        if name not in expected:
            raise SpeculatorError(
                f"{where}: tensor {name} has no place in the model that {CONFIG} describes. Copy "
                f"the checkpoint again, or correct {CONFIG}.",
                cause="missing norm" if "norm" in name else _cause_in(name),
            )


def _cause_in(tensor: str) -> Cause:
    """What is wrong with a speculator that has a fault in this tensor."""
    return "d2t offset" if tensor in MAP_DTYPES else "damaged checkpoint"


def read_tensors(
    stored: Mapping[str, StoredTensor], names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, file by file.

    Raises:
        SpeculatorError: a tensor holds a NaN or an infinity, or weights of another kind.
    """
    for file in sorted({stored[name].file for name in names}):
        with safe_open(file, "pt") as tensors:
            for name in names:
                if stored[name].file != file:
                    continue
                tensor = tensors.get_tensor(stored[name].name)
                check_values(name, tensor, file)
                yield name, tensor


def check_values(name: str, tensor: Tensor, where: object) -> None:
    """Looks for what no draft computes with; ``where`` holds the tensor.

    Raises:
        SpeculatorError: a NaN, an infinity, or weights of another kind.
    """
    is_real = tensor.is_floating_point()
    if tensor.dtype != MAP_DTYPES.get(name, tensor.dtype) or (
        name.endswith((".weight", ".bias")) and not is_real
    ):
        raise SpeculatorError(
            f"{where}: {name} holds {tensor.dtype}, expected "
            f"{MAP_DTYPES.get(name, 'a floating-point dtype')}. Convert the tensor, or "
            "copy the checkpoint again.",
            cause=_cause_in(name),
        )
    if is_real and not is_finite(tensor):
        raise SpeculatorError(
            f"{where}: {name} holds a NaN or an infinity, expected finite values. Copy "
            "the checkpoint again, or restore one from before training diverged.",
            cause=_cause_in(name),
        )


def is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # torch looks for no infinities in eight bits
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


def write_config(folder: str | PathLike, config: Mapping[str, Any]) -> None:
    make_folder(Path(folder))
    write_text(Path(folder) / CONFIG, _json(config))


def write_checkpoint(
    folder: str | PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    max_shard_size: str | int = "5GB",
) -> None:
    """Writes a whole checkpoint; the one it replaces goes only when all of it is on disk."""
    folder = Path(folder)
    old = {INDEX, WEIGHTS}
    if (folder / INDEX).exists():
        old |= {_inside(folder, shard).name for shard in read_weight_map(folder).values()}
    with replaced_files(folder, marker=CONFIG, stale=old) as draft:
        save_torch_state_dict(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            draft,
            max_shard_size=max_shard_size,
            metadata={"format": "pt"},
        )
        (draft / CONFIG).write_text(_json(config), encoding="utf-8")


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def as_dtype(dtype: str | torch.dtype | None, default: torch.dtype = torch.float32) -> torch.dtype:
    """The torch dtype that a config names.

    Raises:
        SpeculatorError: it is not a floating-point dtype.
    """
    name = str(dtype).removeprefix("torch.")
    found = default if dtype is None else getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SpeculatorError(
            f"dtype {name!r} is not a floating-point dtype of torch; expected one such as "
            "bfloat16. Correct it."
        )
    return found


def is_hub_id(name: str, beside: Path | None = None) -> bool:
    """Whether others can find a model by this name: a hub id, and no folder of this machine.

    ``beside``: a folder from which a relative name is meant too.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(locate_verifier(name, beside=beside)).exists()


def locate_verifier(name_or_path: str | PathLike, beside: str | PathLike | None = None) -> str:
    """A verifier's name; a relative folder is looked for from the speculator's folder first."""
    if beside is not None and not Path(name_or_path).is_absolute():
        sibling = Path(beside) / name_or_path
        if sibling.is_dir():
            return str(sibling.resolve())
    return str(name_or_path)
