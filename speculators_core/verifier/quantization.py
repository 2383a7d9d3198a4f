"""Verifiers whose checkpoint is quantized."""

from collections.abc import Mapping
from copy import deepcopy

from transformers import PretrainedConfig, PreTrainedModel

from speculators_core.format.checkpoint import QUANTIZATION_KEYS

COMPRESSED = "compressed-tensors"


def quantization_of(config: PretrainedConfig) -> Mapping[str, object] | None:
    """What a verifier's config states about its quantization; None where it is plain."""
    for owner in (config, config.get_text_config()):
        for key in QUANTIZATION_KEYS:
            stated = getattr(owner, key, None)
            if stated:
                return stated if isinstance(stated, Mapping) else stated.to_dict()
    return None


def method_of(config: PretrainedConfig) -> str | None:
    """The quantization's name, such as ``compressed-tensors int-quantized``."""
    stated = quantization_of(config)
    if stated is None:
        return None
    names = (stated.get("quant_method"), stated.get("format"))
    return " ".join(str(name) for name in names if name) or "quantized"


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a verifier's config for a draft."""
    own = deepcopy(config)
    for key in QUANTIZATION_KEYS:
        if hasattr(own, key):
            delattr(own, key)
    return own


def unpacking(config: PretrainedConfig) -> PretrainedConfig:
    """The config with which Transformers unpacks compressed tensors while it loads them.

    By itself it leaves that to the first pass of the whole model, and a pass through the layers
    alone, which is how states are made, fails. Activations are quantized all the same.
    """
    stated = quantization_of(config)
    if stated is not None and stated.get("quant_method") == COMPRESSED:
        config.quantization_config = {**stated, "dequantize": True}
    return config


def unpack(model: PreTrainedModel) -> PreTrainedModel:
    """A model that someone else has loaded, with its compressed tensors unpacked."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)
    return model
