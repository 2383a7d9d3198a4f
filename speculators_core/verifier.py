"""What is read from a verifier: embeddings, final norm, head, and the states between its layers.

The head and the norm are the verifier's own Transformers modules, so each family keeps its own
convention (a gain of ``w`` or ``1 + w``, soft-capped or scaled logits). They are read by name from
the checkpoint; the layers are never loaded for them.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from speculators_core import checkpoint
from speculators_core.config import SpeculatorModelConfig
from speculators_core.errors import SpeculatorError


class VerifierHead(nn.Module):
    """The verifier's last steps: final norm, head, scale and soft cap; and its embedding table.

    Called with the state after all layers, before the final norm, it gives the verifier's logits.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        text_config = model.config.get_text_config()
        self.config = model.config
        self.norm = decoder_of(model).norm
        self.embed_tokens = model.get_input_embeddings()
        self.lm_head = model.get_output_embeddings()
        self.soft_cap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self.scale = float(getattr(text_config, "logit_scale", None) or 1.0) / float(
            getattr(text_config, "logits_scaling", None) or 1.0
        )

    def forward(
        self, last_hidden: Float[Tensor, "*rows hidden"], token_ids: Tensor | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits over the whole vocabulary, or over ``token_ids`` alone."""
        weight = self.lm_head.weight
        logits = nn.functional.linear(
            self.norm(last_hidden), weight if token_ids is None else weight[token_ids]
        )
        logits = logits * self.scale
        return (
            logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap
        )


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
    folder = checkpoint.fetch(name_or_path, weights=False)
    checkpoint.read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpeculatorError(
            f"{folder}: not a verifier that Transformers reads: {reason}"
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
    folder = checkpoint.fetch(name_or_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = VerifierHead(model)
    stored = checkpoint.stored_tensors(folder)
    names = {id(weight): name for name, weight in model.named_parameters()}
    found: dict[int, Tensor] = {}
    for module in (head.norm, head.embed_tokens, head.lm_head):
        for weight in module.parameters(recurse=False):
            name = _stored_name(names[id(weight)], stored, folder)
            if stored[name].shape != tuple(weight.shape):
                raise SpeculatorError(
                    f"{stored[name].file}: {name} has shape {list(stored[name].shape)}; the "
                    f"config asks for {list(weight.shape)}."
                )
            if id(weight) not in found:
                found[id(weight)] = dict(checkpoint.read_tensors(stored, [name]))[name]
    default = checkpoint.as_dtype(
        str(config.dtype).removeprefix("torch.") if config.dtype else None, torch.float32
    )
    for module in (head.norm, head.embed_tokens, head.lm_head):
        for key, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                read = found[id(weight)].to(dtype or default)
                setattr(module, key, nn.Parameter(read, requires_grad=False))
    return head


def _stored_name(name: str, stored: dict[str, checkpoint.StoredTensor], folder: Path) -> str:
    """The name itself, or the shortest stored name with the same ending (nested text models)."""
    if name in stored:
        return name
    endings = [".".join(name.split(".")[-size:]) for size in (3, 2)]
    for ending in endings:
        matches = sorted((n for n in stored if n.endswith(ending)), key=len)
        if matches:
            return matches[0]
    raise SpeculatorError(f"{folder}: no tensor {name}; it holds {len(stored)} others.")


def check_verifier(
    speculator: SpeculatorModelConfig, verifier: PretrainedConfig, name: str | None = None
) -> None:
    """Compares what must agree between the two before any weights are read.

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
            if layer_id < len(layers):
                hook = self._catch_input(layer_id)
                handle = layers[layer_id].register_forward_pre_hook(hook, with_kwargs=True)
            else:
                hook = self._catch_input(layer_id)
                handle = self.decoder.norm.register_forward_pre_hook(hook, with_kwargs=True)
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
