"""What every store does: take examples on one side and give them on the other."""

from collections.abc import Iterable, Iterator, Sequence
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


@runtime_checkable
class HoldingSource(DataSource, Protocol):
    """A source whose examples are the reader's alone until it has dealt with them: a queue."""

    capacity: int
    """Examples that can be with the reader and on their way to it, at most."""

    def hold(self) -> Iterator[GeneratedExample]:
        """Examples, until no more come before some of them have been dealt with.

        Only `done` says that they have been. A call begins with those that an earlier one gave and
        that were not; one that gives none says that there are no more.

        Raises:
            SpeculatorError: an example is damaged.
        """

    def done(self, keys: Iterable[str]) -> None:
        """The reader has dealt with these examples; keys that it does not hold are skipped."""
