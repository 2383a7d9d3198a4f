"""Options as flags of the command line."""

import json
from typing import Annotated, Any, cast

from cyclopts import Parameter
from pydantic import AfterValidator, Field, JsonValue, create_model

from speculators_core.settings import Settings

Several = Parameter(consume_multiple=True, negative=())
"""A flag with several values behind it: `--parts steps peers`."""


def flags_of(section: type[Settings]) -> Any:
    """The section as flags of the command line beside a file.

    Any option may be missing, and rules over several wait until the file's have joined them
    (`settings.read_sections`).
    """
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = cast(Any, field.annotation)
        if kind == dict[str, JsonValue]:
            # `--model.recipe.num_layers 2` has one word a key, `... [1, 2, 3]` as well
            kind = Annotated[dict[str, Any], AfterValidator(_parsed)]
        fields[name] = (kind, field)
        if field.is_required():
            fields[name] = (kind | None, Field(None, description=field.description))
    return create_model(section.__name__, __base__=Settings, __doc__=section.__doc__, **fields)


def _parsed(words: dict[str, Any]) -> dict[str, Any]:
    """Numbers, truth values and lists among the words of flags; other words stay as they are."""

    def parsed(word: Any) -> Any:
        try:
            return json.loads(word) if isinstance(word, str) else word
        except ValueError:
            return word

    return {key: parsed(word) for key, word in words.items()}
