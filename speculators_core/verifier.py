"""What is read from a verifier: embeddings, final norm, head, and the states between its layers.

The head and the norm are the verifier's own Transformers modules, so each family keeps its own
convention (a gain of ``w`` or ``1 + w``, soft-capped or scaled logits). They are read by name from
the checkpoint; the layers are never loaded for them.
"""

from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from speculators_core import checkpoint
from speculators_core.config import SpeculatorModelConfig
from speculators_core.errors import SpeculatorError, first_line


class VerifierHead(nn.Module):
    """The verifier's last steps: final norm, head, scale and soft cap; and its embedding table.

    Called with the state after all layers, before the final norm, it gives the verifier's logits.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        text_config = model.config.get_text_config()
        self.norm = decoder_of(model).norm
        self.embed_tokens = _Weights(model.get_input_embeddings())
        self.lm_head = _Weights(model.get_output_embeddings())
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
        last_hidden = last_hidden.to(weight.dtype)
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


def decoder_of(model: PreTrainedModel) -> Any:
    """The stack of layers of a causal language model, with its ``layers`` and ``norm``.

    Raises:
        SpeculatorError: the model has no such stack.
    """
    decoder = model.get_decoder()
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
        raise SpeculatorError(
            f"{folder}: not a verifier that Transformers reads: {first_line(error)}"
        ) from error
    config.name_or_path = str(name_or_path)
    return config


def read_verifier_head(
    name_or_path: str | PathLike,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> VerifierHead:
    """Embeddings, final norm and head from a checkpoint, without the layers between.

    Raises:
        SpeculatorError: a tensor is missing, of a wrong shape, or not finite.
    """
    config = read_verifier_config(name_or_path, trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise SpeculatorError(f"{name_or_path}: no language model: {first_line(error)}") from error
    head = VerifierHead(model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    wanted = {weight: names[id(weight)] for weight in head.parameters()}
    stored = _stored_weights(name_or_path, list(wanted.values()))
    expected = {name: tuple(weight.shape) for weight, name in wanted.items()}
    checkpoint.check_shapes(
        {name: tensor.shape for name, tensor in stored.items()}, expected, str(name_or_path)
    )
    read = dict(checkpoint.read_tensors(stored, list(stored)))
    target = dtype or checkpoint.as_dtype(config.dtype)
    for module in (head.norm, head.embed_tokens, head.lm_head):
        for key, weight in list(module.named_parameters(recurse=False)):
            tensor = read[names[id(weight)]].to(target)
            setattr(module, key, nn.Parameter(tensor, requires_grad=False))
    return head


def _stored_weights(
    name_or_path: str | PathLike, names: Sequence[str]
) -> dict[str, checkpoint.StoredTensor]:
    """The named tensors; of a sharded verifier on the hub their shards alone are downloaded."""
    folder = checkpoint.fetch(name_or_path, files=checkpoint.HEAD_FILES)
    if (folder / checkpoint.INDEX).exists():
        weight_map = checkpoint.read_weight_map(folder)
        stored_names = {name: _stored_name(name, weight_map, folder) for name in names}
        shards = {weight_map[stored] for stored in stored_names.values()}
        folder = checkpoint.fetch(name_or_path, files=(*checkpoint.HEAD_FILES, *sorted(shards)))
        stored = checkpoint.stored_tensors(folder, shards)
    else:
        folder = checkpoint.fetch(name_or_path, files=(checkpoint.CONFIG, checkpoint.WEIGHTS))
        stored = checkpoint.stored_tensors(folder)
        stored_names = {name: _stored_name(name, stored, folder) for name in names}
    return {name: stored[stored_name] for name, stored_name in stored_names.items()}


def _stored_name(name: str, stored: Collection[str], folder: Path) -> str:
    """The name itself, or the shortest stored name with the same ending (nested text models)."""
    if name in stored:
        return name
    endings = [".".join(name.split(".")[-size:]) for size in (3, 2)]
    for ending in endings:
        matches = sorted((n for n in stored if n.endswith(f".{ending}")), key=len)
        if matches:
            return matches[0]
    raise SpeculatorError(f"{folder}: no tensor {name}; it holds {len(stored)} others.")


def check_verifier(
    speculator: SpeculatorModelConfig, verifier: PretrainedConfig, name: str | None = None
) -> None:
    """Compares what must agree between the two, and settles what the config leaves open.

    Raises:
        SpeculatorError: another hidden size, vocabulary or number of layers.
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
            getattr(layer, "verifier_num_hidden_layers", None) or text.num_hidden_layers,
        ),
    ):
        if found != expected:
            raise SpeculatorError(
                f"{name}: {what} {found}; the speculator was made for {expected}. "
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
        for layer_id in set(self.layer_ids):
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
        """The last forward's states of these ids, side by side."""
        return torch.cat([self._caught[layer_id] for layer_id in layer_ids], dim=-1)
