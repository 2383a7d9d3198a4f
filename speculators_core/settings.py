"""Options as keywords or in a YAML file, validated."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.registry import did_you_mean


class Settings(BaseModel):
    """Options with bounds in their types; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def refuse_idle(self, *names: str, because: str) -> None:
        """For validators: raises ValueError if one of these options is set and has no effect.

        Its default passes, because a configuration written in full states it.
        """
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name} {value} has no effect: {because}; remove it")

    def stated(self) -> dict[str, object]:
        """The options that were set, also in nested sections, secrets included."""
        return {
            name: value.stated() if isinstance(value, Settings) else value
            for name, value in self
            if name in self.model_fields_set
        }

    @classmethod
    def read(cls, options: Mapping[str, object] | JsonValue, where: str) -> Self:
        """The options of a call.

        Raises:
            SpeculatorError: an option is unknown, missing or out of bounds; ``where`` names the
                call.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise SpeculatorError(f"{where}: {_explain(cls, error)}") from error


def _explain(options: type[BaseModel], error: ValidationError) -> str:
    """The first complaint; of an unknown or missing option with what is known of it."""
    fault = error.errors(include_url=False)[0]
    if fault["type"] not in ("extra_forbidden", "missing"):
        return first_fault(error)
    *sections, name = (str(part) for part in fault["loc"])
    for section in sections:
        if section in options.model_fields:  # else an index of a list
            options = next(_options_in(options.model_fields[section].annotation))
    where = ".".join([*sections, name])
    if fault["type"] == "missing":
        return _missing(options, name, where)
    known = list(options.model_fields)
    # An option that chooses a kind is called `name`: one easily writes `engine: {engine: vllm}`.
    meant = "name" if "name" in known and [name] == sections[-1:] else name
    hint = did_you_mean(meant, known) or f" Expected one of {', '.join(known)}."
    return f"unknown option {where}.{hint}"


def _missing(options: type[BaseModel], name: str, where: str) -> str:
    """An option that is missing; of a section, the first one that must be set."""
    field = options.model_fields[name]
    about, section = field.description, field.annotation
    if isinstance(section, type) and issubclass(section, BaseModel):
        about = section.__doc__
        for inner, found in section.model_fields.items():
            if found.is_required():
                return _missing(section, inner, f"{where}.{inner}")
    return f"{where} is missing: {_one_line(about)}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _options_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Classes of options in a field's type: itself, of a list, or where it is not None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _options_in(inner)


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with a table that other packages cannot change.

    `lmformatenforcer`, which vLLM's structured output imports, changes the shared table in place;
    dates are strings from then on.
    """

    yaml_constructors = {
        f"tag:yaml.org,2002:{kind}": getattr(yaml.SafeLoader, f"construct_yaml_{kind}")
        for kind in "null bool int float binary timestamp omap pairs set str seq map".split()
    } | {None: yaml.SafeLoader.construct_undefined}


def load_yaml(text: str) -> Any:
    """The content of a YAML document, whichever packages were imported before.

    Raises:
        yaml.YAMLError: the text is not valid YAML, or has an unsafe tag.
        ValueError: a value is impossible, such as the date 2001-99-99.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


def read_sections(
    file: Path | None, plan: type[Settings], flags: Mapping[str, Settings | None]
) -> dict[str, Any]:
    """The sections of a YAML file; options that are set as flags take precedence.

    ``plan`` has a field for each section; ``flags`` are sections by name, of which only the options
    that were set count. Nested sections and mappings are merged key by key.

    Raises:
        SpeculatorError: the file cannot be read, has a section that the plan does not have, or a
            value where flags set options of a section.
    """
    sections = {} if file is None else _read_yaml(file, list(plan.model_fields))
    stated = {name: found for name, given in flags.items() if given and (found := given.stated())}
    return _merged(sections, stated, f"{file}: ")


def _merged(
    below: Mapping[str, object], above: Mapping[str, object], where: str
) -> dict[str, object]:
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(value, Mapping) and old is not None:
            if not isinstance(old, Mapping):
                raise SpeculatorError(
                    f"{where}{key}: found {old!r}, expected a mapping of options, as the flags set "
                    "some of them. Correct or remove it."
                )
            merged[key] = _merged(old, value, f"{where}{key}.")
        else:
            merged[key] = value
    return merged


def _read_yaml(file: Path, known: list[str]) -> dict[str, object]:
    try:
        content = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpeculatorError(
            f"{file} cannot be read: {first_line(error)}; expected a YAML file of UTF-8 text. "
            "Correct the path, or the file's permissions."
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise SpeculatorError(
            f"{file} is not valid YAML: {_one_line(str(error))}. Correct that line."
        ) from error
    if not isinstance(content, dict):
        raise SpeculatorError(
            f"{file} holds a {type(content).__name__}; expected the sections {', '.join(known)}. "
            "Write them as keys of a mapping."
        )
    content = _with_underscores(content)
    for name in content:
        if name not in known:
            raise SpeculatorError(
                f"{file}: unknown section {name!r}; expected {', '.join(known)}."
                f"{did_you_mean(str(name), known) or ' Correct or remove it.'}"
            )
    return {
        name: _with_underscores(section) if isinstance(section, dict) else section
        for name, section in content.items()
    }


def _with_underscores(options: dict) -> dict:
    """A dash in the name of a section or an option is an underscore, as in a flag."""
    return {k.replace("-", "_") if isinstance(k, str) else k: v for k, v in options.items()}


def flat(options: Mapping[str, JsonValue], prefix: str = "") -> dict[str, JsonValue]:
    """Nested options by their full names: ``{"a": {"b": 1}}`` is ``{"a.b": 1}``."""
    found: dict[str, JsonValue] = {}
    for key, value in options.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found
