"""Data generation in the form of its public document.

The plan of a `DataGenConfig` with options beside it, and items of `InferencePipeline.forward`.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch

from speculators_core.data_generation.examples import Example
from speculators_core.data_generation.settings import (
    DataGenConfig,
    EngineConfig,
    GenerationPlan,
    RunConfig,
    SyncConfig,
)
from speculators_core.data_generation.texts.conversations import load_chat_template, load_tokenizer
from speculators_core.data_generation.texts.rows import RowReader, choose_parts
from speculators_core.data_generation.texts.spans import RowSkipped
from speculators_core.errors import SpeculatorError
from speculators_core.registry import did_you_mean
from speculators_core.settings import Settings

SECTIONS: dict[str, type[Settings]] = {"engine": EngineConfig, "sync": SyncConfig, "run": RunConfig}
OTHER_NAMES = {"num_workers": "workers", "engine_kwargs": "engine"}
NOT_STORED = SyncConfig(path=Path("nowhere"))
"""Of a pipeline alone, which writes nothing."""

InputItem = str | Sequence[Mapping[str, object]] | Mapping[str, object]
"""A text, the messages of a conversation, or a row of a data set."""


def as_plan(
    config: GenerationPlan | DataGenConfig, options: Mapping[str, object], is_stored: bool = True
) -> GenerationPlan:
    """The plan of a `DataGenConfig` and options beside it: whole sections, or single options.

    An option that two sections have, ``dtype``, is the engine's. A plan has its options already.

    Raises:
        SpeculatorError: an option is unknown, out of bounds, or stands beside a plan.
    """
    if isinstance(config, GenerationPlan):
        if options:
            raise SpeculatorError(
                f"{', '.join(options)} beside a GenerationPlan, which has these options in its "
                "sections. Set them there, or pass a DataGenConfig."
            )
        return config
    sections: dict[str, dict[str, object]] = {name: {} for name in SECTIONS}
    if not is_stored:
        sections["sync"] = NOT_STORED.stated()
    for given, value in options.items():
        name = OTHER_NAMES.get(given, given)
        if name in SECTIONS:
            stated = value.stated() if isinstance(value, Settings) else value
            if not isinstance(stated, Mapping):
                raise SpeculatorError(f"{given}: expected a mapping of options, found {value!r}.")
            sections[name] |= stated
            continue
        owners = [one for one, kind in SECTIONS.items() if name in kind.model_fields]
        if not owners or not (is_stored or owners[0] == "engine"):
            kinds = SECTIONS.values() if is_stored else (EngineConfig,)
            known = [*OTHER_NAMES, *(field for kind in kinds for field in kind.model_fields)]
            raise SpeculatorError(f"unknown option {given!r}.{did_you_mean(given, known)}")
        sections[owners[0]][name] = value
    return GenerationPlan.read({"data": config, **sections}, "options of data generation")


class ItemReader:
    """Items as the examples that an engine runs."""

    def __init__(self, data: DataGenConfig, max_length: int) -> None:
        self._data = data
        self._max_length = max_length

    @cached_property
    def _rows(self) -> RowReader:
        tokenizer = load_tokenizer(self._data)
        chat = load_chat_template(self._data, tokenizer)
        return RowReader(tokenizer, chat, is_open=self._data.states.tokens == "all")

    def read(self, items: Sequence[InputItem]) -> list[Example]:
        """Raises:
        SpeculatorError: one is not a text, conversation or row, or cannot be learned from.
        """
        return [self._read(number, item) for number, item in enumerate(items)]

    def _read(self, number: int, item: InputItem) -> Example:
        columns = self._data.datasets[0].columns
        if isinstance(item, str):
            row: Mapping[str, object] = {
                columns.prompt if self._rows.is_open else columns.text: item
            }
        else:
            row = item if isinstance(item, Mapping) else {columns.messages or "messages": item}
        parts = choose_parts(list(row), columns, f"item {number}", self._rows.is_open)
        try:
            sequence = self._rows.read(dict(row), parts)[0]
        except RowSkipped as skipped:
            raise SpeculatorError(f"item {number}: {skipped}. Remove or correct it.") from skipped
        ids, mask = sequence.input_ids[: self._max_length], sequence.loss_mask[: self._max_length]
        return Example(str(number), torch.tensor(ids), torch.tensor(mask))
