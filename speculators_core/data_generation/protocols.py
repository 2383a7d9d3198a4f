"""What every store does: take examples on one side and give them on the other."""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from speculators_core.data_generation.examples import GeneratedExample, Schema


@runtime_checkable
class DataSink(Protocol):
    """The side of the engine."""

    schema: Schema

    def write(self, example: GeneratedExample) -> None:
        """Takes an example, and waits where there is no room for it.

        Raises:
            SpeculatorError: it cannot be taken.
        """

    def write_batch(self, examples: Sequence[GeneratedExample]) -> None:
        """Takes several."""

    def take_acknowledged(self) -> list[str]:
        """Keys of examples that have arrived for good since the last call."""

    def close(self) -> None:
        """Returns when everything that was written has arrived; then nothing more can be."""

    def abort(self) -> None:
        """Lets go of what has not arrived, at once and from any thread; a waiting `write` ends."""


@runtime_checkable
class DataSource(Protocol):
    """The side of training."""

    schema: Schema

    def read(self) -> Iterator[GeneratedExample]:
        """Examples, until there are no more.

        Asking for the next one says that the one before has been dealt with.

        Raises:
            SpeculatorError: an example is damaged.
        """
