"""The interface of what answers conversations."""

from collections.abc import Iterator
from typing import Protocol

from speculators_core.data_generation.answers.dialogues import Dialogue
from speculators_core.data_generation.answers.settings import AnswersConfig


class Answerer(Protocol):
    """Lets a verifier answer; made from an `AnswersConfig`."""

    def __init__(self, config: AnswersConfig) -> None: ...

    def answer(self, dialogues: Iterator[Dialogue]) -> Iterator[Dialogue]:
        """The same dialogues in the same order, each when it has ended.

        No more are taken ahead than speed needs. One that has ended already is passed on.

        Raises:
            SpeculatorError: nothing can be answered any more.
        """
        ...

    def close(self) -> None: ...
