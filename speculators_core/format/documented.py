"""Config classes as publicly documented: pydantic models, registered."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Generic, Self, TypeVar

from pydantic.fields import FieldInfo
from transformers import PretrainedConfig

from speculators_core.errors import SpeculatorError
from speculators_core.format.checkpoint import RawConfig
from speculators_core.format.schema import checked_fields, own_fields, schema
from speculators_core.registry import CONFIGS, MODELS

Value = TypeVar("Value")
Class = TypeVar("Class", bound=type)


TRAINING_KEYS: Mapping[str, Mapping[str, int | float]] = {
    "dflash": {"max_anchors": 3072},
    "peagle": {"num_depths": 8, "down_sample_ratio": 0.7, "down_sample_ratio_min": 0.2},
    "mtp": {"num_speculative_steps": 3},
}
"""Options of the loss that the documents have in the config, with their defaults there.

A config states them where it was given them; its networks do not read them.
"""


class OfClass(Generic[Value]):
    """An attribute of a class that is worked out when it is read."""

    def __init__(self, read: Callable[[Any], Value]):
        self._read = read

    def __get__(self, _: object, owner: type) -> Value:
        return self._read(owner)


def config_class_of(kind: object) -> Any:
    """The config class that ``speculators_model_type`` names.

    Raises:
        SpeculatorError: there is none.
    """
    if isinstance(kind, str) and kind in CONFIGS.added:
        return CONFIGS.added[kind]
    return MODELS.load(kind).config_class


def registers(base: type, name: str | None, add: Callable[[str, Class], None]) -> Any:
    """A decorator that registers a subclass of ``base``, under its own type where None."""

    def register(found: Class) -> Class:
        config_class = getattr(found, "config_class", found)
        kind = getattr(config_class, "speculators_model_type", None)
        if not issubclass(found, base) or (name or kind) != kind or kind is None:
            raise SpeculatorError(
                f"{found.__name__} cannot be registered as {name!r}: expected a subclass of "
                f"{base.__name__} whose config has speculators_model_type {name or kind!r} as "
                f"its default, found {kind!r}."
            )
        add(kind, found)
        return found

    return register


class PydanticFace(PretrainedConfig):
    """What the documents name on a config class; pydantic's meaning, Transformers' class."""

    model_fields = OfClass[dict[str, FieldInfo]](lambda owner: schema(owner).model_fields)
    """The keys of the class and their bounds."""
    registry = OfClass[dict[str, type]](
        lambda _: {kind: config_class_of(kind) for kind in {*MODELS.names(), *CONFIGS.names()}}
    )
    """Config classes by ``speculators_model_type``."""

    @classmethod
    def register(cls, name: str | None = None) -> Any:
        """Decorator: makes a class of this process known to `from_dict` and `from_pretrained`.

        A package has an entry point in the group ``speculators.models`` instead.

        Raises:
            SpeculatorError: the class is not a config of that type, or the name is taken.
        """

        def add(kind: str, found: type) -> None:
            if kind in MODELS.names() and kind not in MODELS.added:
                MODELS.add(kind, found)  # refuses it
            CONFIGS.add(kind, found)

        return registers(cls, name, add)

    @classmethod
    def reload_schema(cls) -> None:
        """Finds algorithms of packages that were installed since the last look."""
        MODELS.reload()

    @classmethod
    def model_validate(cls, value: object) -> Self:
        """The config of these keys, of the class that they name; a config as it is.

        Raises:
            SpeculatorError: a key or a value is at fault.
        """
        if isinstance(value, cls):
            checked_fields(type(value), value.own_values())
            return value
        if not isinstance(value, Mapping):
            raise SpeculatorError(
                f"a {type(value).__name__} is not a speculator's config; expected a mapping."
            )
        kind = getattr(cls, "speculators_model_type", None)
        known = {} if kind is None else {"speculators_model_type": kind}
        return cls.from_dict({**known, **value})

    @classmethod
    def model_json_schema(cls, **kwargs: Any) -> RawConfig:
        """JSON schema of the keys; ``kwargs`` as in pydantic."""
        return schema(cls).model_json_schema(**kwargs)

    def model_dump(self, **kwargs: Any) -> RawConfig:
        """The keys of the class with their values; ``kwargs`` as in pydantic."""
        return schema(type(self)).model_construct(**self.own_values()).model_dump(**kwargs)

    def model_dump_json(self, **kwargs: Any) -> str:
        """`model_dump` as JSON; ``kwargs`` as in pydantic."""
        return schema(type(self)).model_construct(**self.own_values()).model_dump_json(**kwargs)

    def model_copy(self, *, update: RawConfig | None = None, deep: bool = False) -> Self:
        """A copy with other values of these keys, which are checked.

        Raises:
            SpeculatorError: a value is out of its bounds.
        """
        made = copy.deepcopy(self) if deep else copy.copy(self)
        for name, value in (update or {}).items():
            setattr(made, name, value)
        return made

    def own_values(self) -> RawConfig:
        """The keys of the class with their values, as they are."""
        return {name: getattr(self, name) for name in own_fields(type(self))}
