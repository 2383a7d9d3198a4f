"""``speculators inspect``: shows what a store holds."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field

from speculators_core.flags import AsJson, Switch
from speculators_core.settings import Settings

NOT_SOUND_EXIT = 1


class InspectConfig(Settings):
    """What to show of a store."""

    example: int = Field(0, ge=0)
    """Number of the example to show."""
    max_shown_tokens: int = Field(400, ge=1)
    """Maximum number of its tokens to show."""
    verify: Annotated[bool, Switch] = False
    """Read every byte and compare the checksums. Exit code 1 if a shard is damaged."""
    as_json: AsJson = False
    """Print the numbers as JSON."""


def run(
    store: Path, /, *, config: Annotated[InspectConfig | None, Parameter(name="*")] = None
) -> None:
    """Show what a store holds: numbers, layers, types, and an example with its loss mask.

    Parameters
    ----------
    store
        Folder written by `speculators generate-data`.
    """
    from speculators_core.data_generation.stores.inspection import (
        print_example,
        print_summary,
        summarize,
    )

    config = config or InspectConfig()
    summary = summarize(store, verify=config.verify)
    if config.as_json:
        print(json.dumps(summary.model_dump(), indent=2))
    else:
        print_summary(summary)
        if summary.num_examples:
            print_example(store, config.example, config.max_shown_tokens)
    if summary.damaged:
        raise SystemExit(NOT_SOUND_EXIT)
