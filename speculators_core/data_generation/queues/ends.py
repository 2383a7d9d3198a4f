"""Both ends of a queue, over any transport."""

import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence

from jaxtyping import Shaped
from torch import Tensor

from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.queues.frames import Label
from speculators_core.data_generation.queues.receiver import Arrival, Receiver
from speculators_core.data_generation.queues.sender import QueuedExample, Sender
from speculators_core.errors import SpeculatorError

TIMEOUT_S = 600.0
"""How long the other side may be absent: enough for a verifier to load."""

Load = Callable[[Label, dict[str, Shaped[Tensor, "seq ..."]]], QueuedExample]


class QueueSink:
    """A `DataSink`. Tensors passed to it must not change until they are acknowledged."""

    def __init__(
        self,
        schema: Schema,
        max_message_bytes: int,
        sender: Sender,
        load: Load,
        clean_up: Callable[[], None] = lambda: None,
    ) -> None:
        self.schema = schema
        self.max_message_bytes = max_message_bytes
        self._sender = sender
        self._load = load
        self._clean_up = clean_up

    def write(self, example: GeneratedExample) -> None:
        """Waits while consumers have no room, indefinitely if they are alive.

        Raises:
            SpeculatorError: the example is too large or does not match the schema; no consumer is
                there, or one refuses this producer.
        """
        num_tokens = len(example.input_ids)
        size_bytes = num_tokens * self.schema.token_bytes
        if size_bytes > self.max_message_bytes:
            raise SpeculatorError(
                f"example {example.key!r}: its {num_tokens} tokens take {size_bytes} bytes, "
                f"expected at most sync.max_message_bytes ({self.max_message_bytes}). Increase "
                "that on both sides, or reduce engine.max_length."
            )
        label = {
            "key": example.key,
            "num_tokens": num_tokens,
            "num_prompt_tokens": example.num_prompt_tokens,
        }
        tensors = self.schema.encode(example)
        checked = Label.read(label, f"example {example.key[:80]!r}")
        self._sender.wait_for_room()
        self._sender.put(self._load(checked, tensors))

    def write_batch(self, examples: Sequence[GeneratedExample]) -> None:
        for example in examples:
            self.write(example)

    def take_acknowledged(self) -> list[str]:
        return self._sender.take_acknowledged()

    def close(self) -> None:
        """Waits until consumers have acknowledged everything.

        Raises:
            SpeculatorError: no consumer is there, or one refuses this producer.
        """
        try:
            self._sender.close()
        finally:
            self._clean_up()

    def abort(self) -> None:
        """Stops at once, without marking the end of the data for consumers."""
        self._sender.stop()
        self._clean_up()


class QueueSource:
    """A `HoldingSource`: producers keep an example until the reader has acknowledged it.

    The next `read` or `hold` yields unacknowledged examples again. They go to another consumer if
    this one is closed or lost.
    """

    def __init__(
        self, schema: Schema, receiver: Receiver, clean_up: Callable[[], None] = lambda: None
    ) -> None:
        self.schema = schema
        self.url = receiver.url
        self.capacity = receiver.room * receiver.num_producers
        self.while_waiting: Callable[[], None] = lambda: None
        """Called at least once per heartbeat; an exception from it ends the reader's wait."""
        self._receiver = receiver
        self._held: dict[str, Arrival] = {}
        self._clean_up = clean_up

    @property
    def num_refused(self) -> int:
        """Number of messages refused because they do not fit the protocol or the schema."""
        return self._receiver.num_refused

    def read(self) -> Iterator[GeneratedExample]:
        """Examples, until the expected number of producers have sent everything.

        Raises:
            SpeculatorError: producers are missing.
        """
        for example in self.hold():
            yield example
            self.done([example.key])

    def hold(self) -> Iterator[GeneratedExample]:
        """Like `read`, without acknowledging examples; raises the same errors."""
        for left in reversed(self._held.values()):
            self._receiver.put_back(left)
        self._held.clear()
        while (arrival := self._receiver.take(bool(self._held), self.while_waiting)) is not None:
            example = arrival.load()
            if example is None:
                self._receiver.settle(arrival)
                continue
            self._held[example.key] = arrival
            yield example

    def done(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in self._held:
                self._receiver.settle(self._held.pop(key))

    def close(self) -> None:
        """Notifies producers that they have to send elsewhere."""
        self._receiver.close()
        self._clean_up()


def unique_name() -> str:
    """A producer's name, unique over all machines."""
    return f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"
