"""Protocols of stores and queues: sinks and sources."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from speculators_core.data_generation.examples import GeneratedExample, Schema


@runtime_checkable
class DataSink(Protocol):
    """The side of the engine."""

    schema: Schema

    def write(self, example: GeneratedExample) -> None:
        """Stores or sends an example, after waiting for room.

        Raises:
            SpeculatorError: it cannot be stored or sent.
        """

    def write_batch(self, examples: Sequence[GeneratedExample]) -> None:
        """Calls `write` for each example."""

    def take_acknowledged(self) -> list[str]:
        """Keys of examples that have been stored or acknowledged since the last call."""

    def close(self) -> None:
        """Returns when everything written has arrived; the sink then accepts nothing more."""

    def abort(self) -> None:
        """Drops what has not arrived, at once and from any thread; a waiting `write` raises."""


@runtime_checkable
class DataSource(Protocol):
    """The side of training."""

    schema: Schema

    def read(self) -> Iterator[GeneratedExample]:
        """Examples, until there are no more.

        Requesting the next one acknowledges the previous one.

        Raises:
            SpeculatorError: an example is damaged.
        """


@runtime_checkable
class HoldingSource(DataSource, Protocol):
    """A source that waits for the reader to acknowledge its examples: a queue."""

    capacity: int
    """Maximum number of unacknowledged examples, with the reader or on their way to it."""

    def hold(self) -> Iterator[GeneratedExample]:
        """Examples, until no more can come before some are acknowledged.

        Only `done` acknowledges them. A call first yields the unacknowledged examples of earlier
        calls; a call that yields none means that there are no more.

        Raises:
            SpeculatorError: an example is damaged.
        """

    def done(self, keys: Iterable[str]) -> None:
        """Acknowledges these examples; keys that the reader does not hold are ignored."""
