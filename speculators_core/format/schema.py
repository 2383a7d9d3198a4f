"""The pydantic models that check config classes."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from transformers import PretrainedConfig

from speculators_core.errors import SpeculatorError, UnreadFormatError, first_fault
from speculators_core.format.checkpoint import RawConfig


def own_fields(config_class: type[PretrainedConfig]) -> list[str]:
    """The keys of a speculator's config, without those that every Transformers config has."""
    names = (field.name for field in fields(config_class))
    return [name for name in names if name not in PretrainedConfig.__annotations__]


_SCHEMAS: dict[type, type[BaseModel]] = {}


def schema(config_class: type[PretrainedConfig]) -> type[BaseModel]:
    """The pydantic model that checks a config class, made once from its annotations."""
    if config_class not in _SCHEMAS:
        _SCHEMAS[config_class] = _make_schema(config_class)
    return _SCHEMAS[config_class]


def _make_schema(config_class: type[PretrainedConfig]) -> type[BaseModel]:
    hints: RawConfig = {}
    for parent in reversed(config_class.__mro__):
        if issubclass(parent, PretrainedConfig) and parent is not PretrainedConfig:
            hints |= inspect.get_annotations(parent, eval_str=True)
    defaults = {f.name: f.default for f in fields(config_class)}
    members: RawConfig = {
        name: (hints[name], ... if defaults[name] is MISSING else defaults[name])
        for name in own_fields(config_class)
    }
    settings = ConfigDict(
        extra="forbid",
        strict=True,  # readers take the file as it is, and "false" for true
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )
    return create_model(config_class.__name__, __config__=settings, **members)


def checked_fields(config_class: type[PretrainedConfig], values: Mapping[str, Any]) -> RawConfig:
    """The values of a config's own fields as its annotations want them.

    Raises:
        SpeculatorError: one is not.
        UnreadFormatError: one is of a kind that is not known here.
    """
    try:
        checked = schema(config_class).model_validate(values)
    except ValidationError as error:
        raised = error.errors()[0].get("ctx", {}).get("error")
        if isinstance(raised, UnreadFormatError):
            raise raised from error
        key = str(error.errors()[0]["loc"][0])
        raise SpeculatorError(
            first_fault(error),
            cause="wrong layer ids" if key.endswith("layer_ids") else "invalid config",
        ) from error
    return {name: getattr(checked, name) for name in values}
