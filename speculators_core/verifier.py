"""What is read from a verifier: embeddings, final norm, head, and the states between its layers.

The head and the norm are the verifier's own Transformers modules, so each family keeps its own
convention (a gain of ``w`` or ``1 + w``, soft-capped or scaled logits). They are read by name from
the checkpoint; the layers are never loaded for them. A family that the tests do not cover is
tried on a few tokens, and refused where its own logits are not the ones rebuilt here.
"""

from collections.abc import Collection, Iterable, Sequence
from copy import deepcopy
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from speculators_core import checkpoint
from speculators_core.config import SpeculatorModelConfig
from speculators_core.errors import SpeculatorError, first_line

LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""What `VerifierHead` reads of a config, and not every class heeds."""
PROVEN_FAMILIES: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": (),
    "MistralForCausalLM": (),
    "Qwen2ForCausalLM": (),
    "Qwen3ForCausalLM": (),
    "Qwen3MoeForCausalLM": (),
    "Qwen3NextForCausalLM": (),
    "Qwen3_5ForCausalLM": (),
    "Gemma2ForCausalLM": ("final_logit_softcapping",),
    "Gemma3ForCausalLM": ("final_logit_softcapping",),
    "GptOssForCausalLM": (),
    "Gemma3ForConditionalGeneration": (),
    "Qwen2_5_VLForConditionalGeneration": (),
    "Qwen3VLForConditionalGeneration": (),
}
"""Transformers classes for which the tests prove `VerifierHead`, and the settings they heed."""
TRIED_TOKENS = 16
"""Tokens on which a family's logits are compared, and the vocabulary of its twin."""


class VerifierHead(nn.Module):
    """The verifier's last steps: final norm, head, scale and soft cap; and its embedding table.

    Called with the state after all layers, before the final norm, it gives the verifier's logits.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        text_config = model.config.get_text_config()
        self.norm = decoder_of(model).norm
        self.embed_tokens = _Weights(model.get_input_embeddings())
        self.lm_head = _Weights(_output_embeddings(model))
        self.soft_cap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self.scale = float(getattr(text_config, "logit_scale", None) or 1.0) / float(
            getattr(text_config, "logits_scaling", None) or 1.0
        )

    def forward(
        self, last_hidden: Float[Tensor, "*rows hidden"], token_ids: Tensor | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits over the whole vocabulary, or over ``token_ids`` alone."""
        weight: Tensor = self.lm_head.weight
        bias: Tensor | None = self.lm_head.bias
        last_hidden = last_hidden.to(weight.device, weight.dtype)
        if token_ids is not None:
            weight, bias = weight[token_ids], None if bias is None else bias[token_ids]
        logits = nn.functional.linear(self.norm(last_hidden), weight, bias) * self.scale
        return (
            logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap
        )


class _Weights(nn.Module):
    """The weights of an embedding or a head, without what its family does around them."""

    def __init__(self, module: Any):
        super().__init__()
        self.weight: nn.Parameter = module.weight
        self.bias: nn.Parameter | None = getattr(module, "bias", None)


def _output_embeddings(model: PreTrainedModel) -> Any:
    head = model.get_output_embeddings()
    if head is None:
        raise SpeculatorError(f"{type(model).__name__} has no head; expected a language model.")
    return head


def decoder_of(model: PreTrainedModel) -> Any:
    """The stack of layers of a causal language model, with its ``layers`` and ``norm``.

    Raises:
        SpeculatorError: the model has no such stack.
    """
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers") and hasattr(decoder, "model"):
        decoder = decoder.model  # a text model with a head of its own, inside a vision model
    if not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        raise SpeculatorError(
            f"{type(model).__name__} has no stack of layers with a final norm; "
            "expected a decoder-only language model."
        )
    return decoder


def locate_verifier(name_or_path: str | PathLike, beside: str | PathLike | None = None) -> str:
    """A verifier's name; a relative folder is looked for from the speculator's folder first."""
    if beside is not None and not Path(name_or_path).is_absolute():
        sibling = Path(beside) / name_or_path
        if sibling.is_dir():
            return str(sibling.resolve())
    return str(name_or_path)


def read_verifier_config(
    name_or_path: str | PathLike, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The verifier's config.

    Raises:
        SpeculatorError: there is no such verifier within reach, or no config in it.
    """
    files = [checkpoint.CONFIG, "*.py"] if trust_remote_code else [checkpoint.CONFIG]
    folder = checkpoint.fetch(name_or_path, files=files)
    checkpoint.read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        hint = " Trust it with trust_remote_code." if "trust_remote_code" in str(error) else ""
        raise SpeculatorError(
            f"{folder}: not a verifier that Transformers reads: {first_line(error)}{hint}"
        ) from error
    config.name_or_path = str(name_or_path)
    return config


def read_tokenizer(name_or_path: str | PathLike, trust_remote_code: bool = False) -> Any:
    """The verifier's tokenizer.

    Raises:
        SpeculatorError: there is none that Transformers reads.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise SpeculatorError(
            f"{name_or_path}: no tokenizer that Transformers reads: {first_line(error)}"
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
    if not _is_proven(model):
        _check_twin(_without_weights(config, trust_remote_code))
    stored = _stored_weights(name_or_path, model, head.parameters())
    checkpoint.check_shapes(
        {tensor.name: tensor.shape for tensor in stored.values()},
        {tensor.name: tuple(weight.shape) for weight, tensor in stored.items()},
        str(name_or_path),
    )
    by_name = {tensor.name: tensor for tensor in stored.values()}
    read = dict(checkpoint.read_tensors(by_name, list(by_name)))
    target = dtype or checkpoint.as_dtype(config.dtype or config.get_text_config().dtype)
    for module in (head.norm, head.embed_tokens, head.lm_head):
        for key, weight in list(module.named_parameters(recurse=False)):
            tensor = read[stored[weight].name].to(target)
            setattr(module, key, nn.Parameter(tensor, requires_grad=False))
    return head


def read_final_norm(
    name_or_path: str | PathLike, config: PretrainedConfig, **where: Any
) -> Float[Tensor, "hidden"]:
    """The weights of the last norm alone; ``where`` are `checkpoint.fetch`'s.

    Raises:
        SpeculatorError: they are missing, or not finite.
    """
    model = _without_weights(config, trust_remote_code=False)
    stored = _stored_weights(name_or_path, model, [decoder_of(model).norm.weight], **where)
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
            f"{config.name_or_path}: no language model: {first_line(error)}"
        ) from error


def _stored_weights(
    name_or_path: str | PathLike,
    model: PreTrainedModel,
    weights: Iterable[nn.Parameter],
    **where: Any,
) -> dict[nn.Parameter, checkpoint.StoredTensor]:
    """Where these weights lie; of a sharded verifier on the hub their shards alone are fetched."""
    wanted = list(weights)
    folder = checkpoint.fetch(name_or_path, files=checkpoint.HEAD_FILES, **where)
    if (folder / checkpoint.INDEX).exists():
        weight_map = checkpoint.read_weight_map(folder)
        names = _stored_names(model, wanted, weight_map, folder)
        shards = {weight_map[name] for name in names.values()}
        files = (*checkpoint.HEAD_FILES, *sorted(shards))
        folder = checkpoint.fetch(name_or_path, files=files, **where)
        stored = checkpoint.stored_tensors(folder, shards)
    else:
        files = (checkpoint.CONFIG, checkpoint.WEIGHTS)
        folder = checkpoint.fetch(name_or_path, files=files, **where)
        stored = checkpoint.stored_tensors(folder)
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
            raise SpeculatorError(f"{folder}: no tensor {names[0]}; it holds {len(stored)} others.")
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


def check_head(model: PreTrainedModel) -> None:
    """Compares a live verifier's logits with those that its `VerifierHead` gives, on a few tokens.

    Nothing is run for a family that the tests prove. `read_verifier_head` makes its own check.

    Raises:
        SpeculatorError: they differ.
    """
    if not _is_proven(model):
        _compare_logits(model)


def _is_proven(model: PreTrainedModel) -> bool:
    kind = type(model)
    if kind.__name__ not in PROVEN_FAMILIES or not kind.__module__.startswith("transformers."):
        return False
    text_config = model.config.get_text_config()
    present = {name for name in LOGIT_SETTINGS if getattr(text_config, name, None) is not None}
    return present <= set(PROVEN_FAMILIES[kind.__name__])


def _compare_logits(model: PreTrainedModel) -> None:
    embeddings = model.get_input_embeddings().weight
    tokens = torch.arange(TRIED_TOKENS, device=embeddings.device)[None] % len(embeddings)
    last = len(decoder_of(model).layers)
    with torch.no_grad(), LayerTaps(model, [last]) as taps:
        own = model(input_ids=tokens, use_cache=False).logits.float()
        rebuilt = VerifierHead(model)(taps.states([last])).float().to(own.device)
    # Equal steps in equal order: what remains is the rounding of the last product.
    tolerance = max(1e-5, 4 * torch.finfo(embeddings.dtype).eps)
    bound = tolerance * own.abs().max().item()
    same_shape = own.shape == rebuilt.shape
    difference = (own - rebuilt).abs().max().item() if same_shape else float("inf")
    if not difference < bound:  # nor where either is not a number
        raise SpeculatorError(
            f"{type(model).__name__}: its logits and those rebuilt from its last hidden state "
            f"differ by {difference:.3g} (bound {bound:.3g}), so it does more between final norm "
            "and logits than we know. Take a verifier of another family, or teach VerifierHead "
            f"in {__name__} this one."
        )


def _check_twin(model: PreTrainedModel) -> None:
    """Compares the logits of a model that has no weights yet, after giving it a few random ones.

    Its layers go and its vocabulary shrinks. Other modules get their weights, at real width, as
    they are called: what a text does not pass (a vision tower) is never allocated.

    Raises:
        SpeculatorError: the logits differ, or the class does not run without its layers.
    """
    decoder_of(model).layers = nn.ModuleList()
    embeddings, head = model.get_input_embeddings(), _output_embeddings(model)
    generator = torch.Generator().manual_seed(0)
    made: dict[Tensor, Tensor] = {}  # tied weights stay tied

    def give_weights(module: nn.Module, _: Any = None) -> None:
        has_vocabulary = isinstance(module, nn.Embedding) or module in (embeddings, head)
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
        for key, weight in [*module.named_parameters(recurse=False)]:
            if weight.is_meta:
                if weight not in made:
                    made[weight] = nn.Parameter(_random(weight, has_vocabulary, generator))
                setattr(module, key, made[weight])
        for key, buffer in [*module.named_buffers(recurse=False)]:
            if buffer.is_meta:
                setattr(module, key, _random(buffer, False, generator))

    for module in model.modules():
        module.register_forward_pre_hook(give_weights)
    give_weights(embeddings)
    give_weights(head)
    try:
        _compare_logits(model.eval())
    except SpeculatorError:
        raise
    except Exception as error:  # whatever the class says to having no layers
        raise SpeculatorError(
            f"{type(model).__name__}: cannot compare its logits with those rebuilt from its last "
            f"hidden state ({first_line(error)}). Attach the loaded verifier in place of its name."
        ) from error


def _random(like: Tensor, has_vocabulary: bool, generator: torch.Generator) -> Tensor:
    """Gains around one, matrices that keep the size of what they are applied to."""
    shape = (min(len(like), TRIED_TOKENS), *like.shape[1:]) if has_vocabulary else like.shape
    if not like.is_floating_point():
        return torch.ones(shape, dtype=like.dtype)
    if like.ndim < 2:
        return torch.rand(shape, generator=generator) + 0.5
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def check_verifier(
    speculator: SpeculatorModelConfig, verifier: PretrainedConfig, name: str | None = None
) -> None:
    """Compares what must agree between the two, and settles what the config leaves open.

    Raises:
        SpeculatorError: another hidden size, vocabulary, number of layers or architecture.
    """
    text = verifier.get_text_config()
    layer = speculator.transformer_layer_config
    name = name or verifier.name_or_path or type(verifier).__name__
    expected_hidden = getattr(speculator, "target_hidden_size", None) or layer.hidden_size
    for what, found, expected in (
        ("hidden size", text.hidden_size, expected_hidden),
        ("vocabulary size", text.vocab_size, layer.vocab_size),
        (
            "number of layers",
            text.num_hidden_layers,
            speculator.verifier_depth or text.num_hidden_layers,
        ),
    ):
        if found != expected:
            raise SpeculatorError(
                f"{name}: {what} {found}; the speculator was made for {expected}. "
                f"Pass the verifier it was trained with ({speculator.verifier.name_or_path})."
            )
    found, expected = verifier.architectures or [], speculator.verifier.architectures
    if text is verifier and found and expected and not set(found) & set(expected):
        raise SpeculatorError(
            f"{name} is a {', '.join(found)}; the speculator was made for {', '.join(expected)}. "
            f"Pass the verifier it was trained with ({speculator.verifier.name_or_path})."
        )
    speculator.settle(text)
    layer_ids = getattr(speculator, "aux_layer_ids", None) or []
    if layer_ids and layer_ids[-1] > text.num_hidden_layers:
        raise SpeculatorError(
            f"aux layer id {layer_ids[-1]} is out of range: {name} has "
            f"{text.num_hidden_layers} layers."
        )


class LayerTaps:
    """Catches, while it is entered, the states between a verifier's layers.

    Id k is the residual stream after k layers: 0 the embeddings, n the output of the last layer
    *before* the final norm.
    """

    def __init__(self, model: PreTrainedModel, layer_ids: Sequence[int]):
        self.decoder = decoder_of(model)
        self.layer_ids = list(layer_ids)
        self._caught: dict[int, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "LayerTaps":
        layers = self.decoder.layers
        for layer_id in set(self.layer_ids) or {0}:  # of none, the first tells the shape
            reader = layers[layer_id] if layer_id < len(layers) else self.decoder.norm
            hook = self._catch_input(layer_id)
            handle = reader.register_forward_pre_hook(hook, with_kwargs=True)
            self._handles.append(handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _catch_input(self, layer_id: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._caught[layer_id] = args[0] if args else kwargs["hidden_states"]

        return hook

    def states(self, layer_ids: Sequence[int]) -> Float[Tensor, "batch seq states_hidden"]:
        """The last forward's states of these ids, side by side; of no ids a width of zero."""
        if not layer_ids:
            return next(iter(self._caught.values()))[..., :0]
        return torch.cat([self._caught[layer_id] for layer_id in layer_ids], dim=-1)
