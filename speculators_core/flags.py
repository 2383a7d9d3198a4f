"""Options as flags of the command line."""

from collections.abc import Collection
from typing import Annotated, Any

from cyclopts import Group, Parameter
from pydantic import AfterValidator, Field, GetPydanticSchema, JsonValue, create_model

from speculators_core.settings import Settings

Several = Parameter(
    consume_multiple=True,
    negative=(),
    show_default=lambda values: " ".join(map(str, values or ())) or None,
)
"""A flag with several values: `--parts steps peers`."""

Switch = Parameter(negative=(), show_default=False)
"""A flag that only turns something on."""

AsJson = Annotated[bool, Parameter(name="--json", negative=(), show_default=False)]
"""Prints a report as JSON, alone on stdout."""


def _with_underscores(options: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Names of options are Python's: a dash in one is an underscore, in JSON as in a flag."""
    renamed = {name.replace("-", "_"): value for name, value in options.items()}
    if len(renamed) < len(options):
        raise ValueError("one option is given twice, with dashes and with underscores")
    return renamed


JsonOptions = Annotated[
    dict[str, Any],  # the parser of flags does not know `JsonValue`
    GetPydanticSchema(lambda _, handler: handler(dict[str, JsonValue])),
    AfterValidator(_with_underscores),
    Parameter(metavar="JSON", show_default=False),
]
"""Options that another library names: `--engine-args '{"max_model_len": 4096}'`, or a flag for
each, `--engine-args.max-model-len 4096`."""


def group(title: str, section: type[Settings] | None = None) -> Group:
    """Flags under a separate title in ``--help``, in the order in which groups are made."""
    about = "" if section is None else section.__doc__ or ""
    return Group.create_ordered(title, help=" ".join(about.split()))


def flags_of(plan: type[Settings]) -> type[Settings]:
    """The sections of a plan as flags beside a file, a group for each.

    No option is required as a flag, and rules over several options wait until those of the file
    have joined them (`settings.read_sections`).
    """
    sections: dict[str, Any] = {}
    for name, field in plan.model_fields.items():
        section: Any = field.annotation
        flag = Parameter(group=group(name.capitalize(), section))
        sections[name] = (Annotated[optional(section) | None, flag], None)
    return create_model(f"{plan.__name__}Flags", __base__=Settings, **sections)


def optional(section: type[Settings], leave_out: Collection[str] = ()) -> type[Settings]:
    """The section with options that may all be missing, and without its rules over several."""
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if name in leave_out:
            continue
        kind: Any = field.annotation
        if field.is_required():
            about = f"{field.description} Required, here or in the file."
            flag = [part for part in field.metadata if isinstance(part, Parameter)]
            fields[name] = (Annotated[(kind | None, *flag, None)], Field(None, description=about))
        else:
            fields[name] = (kind, field)
    return create_model(section.__name__, __base__=Settings, __doc__=section.__doc__, **fields)
