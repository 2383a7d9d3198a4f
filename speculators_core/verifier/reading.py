"""Reads a verifier: config, tokenizer, head, weights.

The head and the norm are the verifier's Transformers modules, so each family keeps its own
convention (a gain of ``w`` or ``1 + w``, soft-capped or scaled logits). They are read by name from
the checkpoint; the layers are never loaded for them. A family that the tests do not cover is
tried on a few tokens, and refused where its own logits are not the ones rebuilt here.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import read_json
from speculators_core.format import checkpoint
from speculators_core.format.checkpoint import is_finite
from speculators_core.verifier.head import VerifierHead, decoder_of
from speculators_core.verifier.proof import _check_twin, _is_proven
from speculators_core.verifier.quantization import quantization_of, unpacking


def load_verifier(
    name_or_path: str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    device_map: str | Mapping[str, int | str] | None = None,
) -> PreTrainedModel:
    """The whole verifier, after its files were checked.

    ``device_map`` is Transformers'; without one the verifier is on the CPU.

    Raises:
        SpeculatorError: a file or a tensor is missing, or a file is truncated.
    """
    files = (*checkpoint.ALL_FILES, "*.py") if trust_remote_code else checkpoint.ALL_FILES
    folder = checkpoint.fetch(name_or_path, files=files)
    checkpoint.stored_tensors(folder)
    read_generation_config(folder)
    config = unpacking(_config_in(folder, trust_remote_code))
    auto_class = language_model_class(config)
    try:
        model, loading = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            output_loading_info=True,
        )
    except ImportError as error:
        raise SpeculatorError(
            f"{name_or_path}: Transformers lacks a package to load it: "
            f"{first_line(error).rstrip('.')}. Install it; vLLM may serve this model without it."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise SpeculatorError(
            f"{name_or_path}: Transformers could not load it: {first_line(error).rstrip('.')}; "
            "expected a config.json and weights that fit together. Copy the checkpoint again, or "
            "correct its config.json."
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise SpeculatorError(
            f"{name_or_path}: {len(missing)} tensors of a {type(model).__name__} are missing "
            f"({missing[0]}); expected all of them. Copy the checkpoint again, or correct its "
            "config.json."
        )
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not is_finite(weight):
            raise SpeculatorError(
                f"{name_or_path}: {name} holds a NaN or an infinity, expected finite values. Copy "
                "the checkpoint again."
            )
    return model.eval()


def with_head(model: PreTrainedModel) -> PreTrainedModel:
    """The language model of a stack of layers that was loaded without its head (``AutoModel``).

    The head is the embeddings where the two are tied, else the one of the stack's checkpoint.
    A model that has a head stays as it is.

    Raises:
        SpeculatorError: Transformers has no language model of this kind, or there is no head.
    """
    if model.get_output_embeddings() is not None:
        return model
    remedy = "Load the verifier with AutoModelForCausalLM."
    whole = _without_weights(model.config, trust_remote_code=False)
    inner, prefix = getattr(whole, whole.base_model_prefix, None), whole.base_model_prefix
    head: Any = whole.get_output_embeddings()
    if not isinstance(inner, type(model)) or head is None:
        raise SpeculatorError(f"{type(model).__name__} has no head. {remedy}")
    if model.config.get_text_config().tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
    else:
        own = list(head.named_parameters())
        try:
            read = _read_weights(model.name_or_path, whole, [weight for _, weight in own])
        except SpeculatorError as error:
            raise SpeculatorError(
                f"{type(model).__name__} has no head, and its checkpoint gave none: {error} "
                f"{remedy}"
            ) from error
        for key, weight in own:
            value = read[weight].to(model.device, model.dtype)
            setattr(head, key, nn.Parameter(value, requires_grad=False))
    setattr(whole, prefix, model)
    if (stated := read_generation_config(model.name_or_path)) is not None:
        whole.generation_config = stated
    return whole.eval()


def verifier_config_of(
    verifier: str | PreTrainedModel, trust_remote_code: bool = False
) -> PretrainedConfig:
    if isinstance(verifier, PreTrainedModel):
        return verifier.config
    return read_verifier_config(verifier, trust_remote_code)


def read_verifier_config(
    name_or_path: str | PathLike, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The verifier's config.

    Raises:
        SpeculatorError: there is no such verifier within reach, or no config in it.
    """
    files = [checkpoint.CONFIG, "*.py"] if trust_remote_code else [checkpoint.CONFIG]
    config = _config_in(checkpoint.fetch(name_or_path, files), trust_remote_code)
    config.name_or_path = str(name_or_path)
    return config


def _config_in(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    stated = checkpoint.read_config(folder)
    if checkpoint.is_speculator(stated):
        raise SpeculatorError(
            f"{folder / checkpoint.CONFIG} is that of a speculator, expected a verifier's. "
            "Name the model that the speculator drafts for."
        )
    for key in ("dtype", "torch_dtype"):  # Transformers fails on a wrong one without its name
        name = stated.get(key)
        if name is not None and not isinstance(getattr(torch, str(name), name), torch.dtype | dict):
            if name != "auto":
                raise SpeculatorError(
                    f"{folder / checkpoint.CONFIG}: {key} is {name!r:.80}, expected one such as "
                    "bfloat16. Correct or remove it."
                )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (
        *(ArithmeticError, AttributeError, LookupError, OSError, RuntimeError),
        *(StrictDataclassError, TypeError, ValueError),
    ) as error:
        is_of_a_key = isinstance(error, StrictDataclassError)  # which its other lines explain
        reason = " ".join(str(error).split()) if is_of_a_key else first_line(error)
        hint = " Trust it with trust_remote_code." if "trust_remote_code" in str(error) else ""
        raise SpeculatorError(
            f"{folder / checkpoint.CONFIG}: Transformers cannot read this verifier: {reason}"
            f"{hint or ' Expected a model of a supported architecture; choose another one.'}"
        ) from error


def read_generation_config(name_or_path: str | PathLike) -> GenerationConfig | None:
    """The verifier's defaults of generation; None where it states none.

    Raises:
        SpeculatorError: the file cannot be read, or names special tokens otherwise than by id.
    """
    file = Path(name_or_path) / "generation_config.json"
    stated = read_json(file) if file.exists() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = stated.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int for token in ids):
            raise SpeculatorError(
                f"{file}: {key} is {value!r:.80}, expected the id of a token. Correct or remove it."
            )
    try:
        return GenerationConfig.from_pretrained(name_or_path)
    except (OSError, TypeError, ValueError) as error:
        if not file.exists():
            return None
        raise SpeculatorError(
            f"{file}: Transformers cannot read it: {first_line(error)}; expected a generation "
            "config. Correct or remove it."
        ) from error


def read_tokenizer(
    name_or_path: str | PathLike, trust_remote_code: bool = False, **options: JsonValue
) -> Any:
    """The verifier's tokenizer; ``options`` are passed on to Transformers.

    Raises:
        SpeculatorError: there is none that Transformers reads, or it is empty.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, **options
        )
        is_empty = not tokenizer("a", add_special_tokens=False)["input_ids"]
    except Exception as error:  # of Transformers, tokenizers, the hub, and of options it passes on
        _check_tokenizer_files(Path(name_or_path))
        raise SpeculatorError(
            f"{name_or_path}: the tokenizer cannot be loaded: {first_line(error).rstrip('. ')}; "
            "expected tokenizer.json and tokenizer_config.json. Correct the name, or copy them "
            "there."
        ) from error
    if is_empty:
        # Transformers makes an empty one where the files are missing.
        raise SpeculatorError(
            f"{name_or_path}: no tokenizer, or one that knows no text; expected tokenizer.json and "
            "tokenizer_config.json. Copy them there."
        )
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    """Raises SpeculatorError for the first of a local tokenizer's files that cannot be read."""
    for file in (*sorted(folder.glob("*token*.json")), folder / "chat_template.jinja"):
        try:
            if file.suffix == ".json":
                read_json(file, "a tokenizer")
            elif file.exists():
                file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpeculatorError(
                f"{file} cannot be read: {first_line(error)}; expected UTF-8 text. Copy it again."
            ) from error


def language_model_class(config: PretrainedConfig) -> Any:
    """The Auto class that builds and loads the verifier which a config describes.

    Transformers knows most vision models not as causal language models; their text part is one.
    """
    for mapping, auto_class in (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    ):
        if type(config) in mapping:
            return auto_class
    return AutoModelForCausalLM  # the checkpoint's own class, or Transformers' complaint


def model_class_of(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Transformers' class of the verifier that a config describes; None for one of own code."""
    found = language_model_class(config)._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def read_verifier_head(
    name_or_path: str | PathLike,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> VerifierHead:
    """Embeddings, final norm and head from a checkpoint, without the layers between.

    Raises:
        SpeculatorError: a tensor is missing, of a wrong shape, or not finite; or the family's
            logits are not rebuilt.
    """
    config = read_verifier_config(name_or_path, trust_remote_code)
    model = _without_weights(config, trust_remote_code)
    head = VerifierHead(model)
    if _has_quantized_ends(name_or_path, model, head):
        return VerifierHead(load_verifier(str(name_or_path), dtype, trust_remote_code))
    if not _is_proven(model):
        _check_twin(_without_weights(config, trust_remote_code))
    read = _read_weights(name_or_path, model, head.parameters())
    target = dtype or checkpoint.as_dtype(config.dtype or config.get_text_config().dtype)
    for module in (head.norm, head.embed_tokens, head.lm_head):
        for key, weight in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(read[weight].to(target), requires_grad=False))
    return head


def _has_quantized_ends(
    name_or_path: str | PathLike, model: PreTrainedModel, head: VerifierHead
) -> bool:
    """Whether embeddings or head have scales: Transformers knows how to apply them."""
    if quantization_of(model.config) is None:
        return False
    folder = checkpoint.fetch(name_or_path, checkpoint.HEAD_FILES)
    if (folder / checkpoint.INDEX).exists():
        stored: Collection[str] = checkpoint.read_weight_map(folder)
    else:
        files = (*checkpoint.HEAD_FILES, checkpoint.WEIGHTS)
        stored = checkpoint.stored_tensors(checkpoint.fetch(name_or_path, files))
    ends = {id(weight) for weight in head.parameters()}
    names = (name for name, weight in model.named_parameters() if id(weight) in ends)
    return any(f"{name}_{kind}" in stored for name in names for kind in ("scale", "packed"))


def _read_weights(
    name_or_path: str | PathLike, model: PreTrainedModel, weights: Iterable[nn.Parameter]
) -> dict[nn.Parameter, Tensor]:
    """The values that a checkpoint has for these weights of a model.

    Raises:
        SpeculatorError: a tensor is missing, of a wrong shape, or not finite.
    """
    stored = _stored_weights(name_or_path, model, weights)
    checkpoint.check_shapes(
        {tensor.name: tensor.shape for tensor in stored.values()},
        {tensor.name: tuple(weight.shape) for weight, tensor in stored.items()},
        str(name_or_path),
    )
    by_name = {tensor.name: tensor for tensor in stored.values()}
    read = dict(checkpoint.read_tensors(by_name, list(by_name)))
    return {weight: read[tensor.name] for weight, tensor in stored.items()}


def read_final_norm(
    name_or_path: str | PathLike,
    config: PretrainedConfig,
    hub: checkpoint.HubOptions | None = None,
) -> Float[Tensor, "hidden"]:
    """The weights of the last norm alone.

    Raises:
        SpeculatorError: they are missing, or not finite.
    """
    model = _without_weights(config, trust_remote_code=False)
    stored = _stored_weights(
        name_or_path, model, [decoder_of(model).norm.get_parameter("weight")], hub
    )
    (tensor,) = stored.values()
    return dict(checkpoint.read_tensors({tensor.name: tensor}, [tensor.name]))[tensor.name]


def _without_weights(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    auto_class = language_model_class(config)
    try:
        with torch.device("meta"):
            return auto_class.from_config(
                deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except (ValueError, ImportError) as error:  # ImportError: some vision towers need packages
        raise SpeculatorError(
            f"{config.name_or_path}: not a language model: {first_line(error)}; expected a causal "
            "language model. Choose such a verifier."
        ) from error


def _stored_weights(
    name_or_path: str | PathLike,
    model: PreTrainedModel,
    weights: Iterable[nn.Parameter],
    hub: checkpoint.HubOptions | None = None,
) -> dict[nn.Parameter, checkpoint.StoredTensor]:
    """Where these weights lie; of a sharded verifier on the hub their shards alone are fetched."""
    wanted = list(weights)
    folder = checkpoint.fetch(name_or_path, checkpoint.HEAD_FILES, hub)
    files = {checkpoint.WEIGHTS}
    if (folder / checkpoint.INDEX).exists():
        weight_map = checkpoint.read_weight_map(folder)
        names = _stored_names(model, wanted, weight_map, folder)
        files = {weight_map[name] for name in names.values()}
    folder = checkpoint.fetch(name_or_path, (*checkpoint.HEAD_FILES, *sorted(files)), hub)
    stored = checkpoint.stored_tensors(folder, files)
    names = _stored_names(model, wanted, stored, folder)
    return {weight: stored[name] for weight, name in names.items()}


def _stored_names(
    model: PreTrainedModel, weights: Sequence[nn.Parameter], stored: Collection[str], folder: Path
) -> dict[nn.Parameter, str]:
    """The checkpoint's names of these weights; of tied ones it may hold either.

    Many checkpoints keep names of older classes, or nest the text model under another prefix:
    names are then changed as Transformers changes them when it loads the whole model.
    """
    own_names: dict[nn.Parameter, list[str]] = {weight: [] for weight in weights}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight in own_names:
            own_names[weight].append(name)
    stored_as = {name: name for name in stored}
    if any(stored_as.keys().isdisjoint(names) for names in own_names.values()):
        stored_as = _renamed(model, stored) | stored_as
    found = {}
    for weight, names in own_names.items():
        matches = [stored_as[name] for name in names if name in stored_as]
        if not matches:
            raise SpeculatorError(
                f"{folder}: no tensor {names[0]} among its {len(stored)}, which the verifier's "
                "class expects. Copy the verifier again, with all its files."
            )
        found[weight] = matches[0]
    return found


def _renamed(model: PreTrainedModel, stored: Collection[str]) -> dict[str, str]:
    """The model's names for stored tensors that are kept as they are, with the stored names."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    own = model.state_dict()
    renamed = {}
    for name in stored:
        new_name, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, own
        )
        if converter is None:
            renamed[new_name] = name
    return renamed
