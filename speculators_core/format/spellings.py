"""Alternative config spellings that vLLM reads alike."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from speculators_core.format.schema import schema


def in_the_formats_words(
    raw: Mapping[str, Any], config_class: type[PretrainedConfig]
) -> dict[str, Any]:
    """A ``config.json`` whose flags are booleans, and whose ``speculators_config`` is complete."""
    result = dict(raw)
    for name, field in schema(config_class).model_fields.items():
        if field.annotation is bool and name in result:
            _put(result, name, _as_flag(result[name]))
    for key in ("dtype", "torch_dtype"):
        if isinstance(result.get(key), str):
            name = result[key].removeprefix("torch.")
            _put(result, key, None if name == "auto" else name)
    if isinstance(inner := result.get("speculators_config"), Mapping):
        result["speculators_config"] = _completed(inner, result.get("speculators_model_type"))
    return result


def layers_in_the_formats_words(
    layer_config: Mapping[str, Any], config_class: type[PretrainedConfig]
) -> dict[str, Any]:
    """A layers' config of the types that its class demands, with vLLM's width of a head.

    A rotary embedding for each kind of layer becomes that of the one kind that there is.
    """
    result = dict(layer_config)
    for field in fields(config_class):
        value = result.get(field.name)
        if isinstance(field.default, bool) and field.name in result and value is None:
            del result[field.name]
        elif isinstance(field.default, float) and type(value) is int:
            result[field.name] = float(value)
        elif type(field.default) is int and isinstance(value, float) and value.is_integer():
            result[field.name] = int(value)
    hidden, heads = result.get("hidden_size"), result.get("num_attention_heads")
    if result.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int):
        if heads > 0 and any(field.name == "head_dim" for field in fields(config_class)):
            result["head_dim"] = hidden // heads
    kinds, rope = result.get("layer_types") or ["full_attention"], result.get("rope_parameters")
    if isinstance(rope, Mapping) and isinstance(kinds, list) and isinstance(kinds[0], str):
        if kinds.count(kinds[0]) == len(kinds) and isinstance(rope.get(kinds[0]), Mapping):
            result["rope_parameters"] = dict(rope[kinds[0]])
    return result


def _put(config: dict[str, Any], key: str, value: object) -> None:
    """Sets the key, or leaves it to its default where the value is None."""
    if value is None:
        del config[key]
    else:
        config[key] = value


def _as_flag(value: object) -> object:
    return bool(value) if type(value) is int and value in (0, 1) else value


def _completed(inner: Mapping[str, Any], kind: object) -> dict[str, Any]:
    """With what vLLM does not read of it: names of the algorithm and of the proposals."""
    result = {"algorithm": kind, **inner}
    if isinstance(methods := result.get("proposal_methods"), list):
        result["proposal_methods"] = [
            {"proposal_type": "greedy", **_without_nulls(method)}
            if isinstance(method, Mapping)
            else method
            for method in methods
        ]
        first = next(iter(result["proposal_methods"]), None)
        if result.get("default_proposal_method") is None and isinstance(first, Mapping):
            result["default_proposal_method"] = first["proposal_type"]
    if isinstance(verifier := result.get("verifier"), Mapping):
        result["verifier"] = {
            key: value
            for key, value in verifier.items()
            if value is not None or key == "name_or_path"
        }
    return result


def _without_nulls(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}
