"""The two ends of a queue of examples, whichever way their bytes go."""

import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence

from jaxtyping import Shaped
from torch import Tensor

from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.queues.frames import Label
from speculators_core.data_generation.queues.receiver import Arrival, Receiver
from speculators_core.data_generation.queues.sender import Parcel, Sender
from speculators_core.errors import SpeculatorError

TIMEOUT_S = 600.0
"""How long nobody may be there on the other side: as long as a verifier takes to load."""

Load = Callable[[Label, dict[str, Shaped[Tensor, "seq ..."]]], Parcel]


class QueueSink:
    """A `DataSink`. Tensors that were handed in must not change until they are acknowledged."""

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
        """Waits while consumers have no room, for ever if they are alive.

        Raises:
            SpeculatorError: the example is too large or not of the schema; or there is no
                consumer, or one that refuses us.
        """
        num_tokens = len(example.input_ids)
        size_bytes = num_tokens * self.schema.token_bytes
        if size_bytes > self.max_message_bytes:
            raise SpeculatorError(
                f"example {example.key!r}: {num_tokens} tokens are {size_bytes} bytes, over "
                f"sync.max_message_bytes {self.max_message_bytes}."
            )
        label = {
            "key": example.key,
            "num_tokens": num_tokens,
            "num_prompt_tokens": example.num_prompt_tokens,
        }
        tensors = self.schema.encode(example)
        parcel_label = Label.read(label, f"example {example.key[:80]!r}")
        self._sender.wait_for_room()
        self._sender.put(self._load(parcel_label, tensors))

    def write_batch(self, examples: Sequence[GeneratedExample]) -> None:
        for example in examples:
            self.write(example)

    def take_acknowledged(self) -> list[str]:
        return self._sender.take_acknowledged()

    def close(self) -> None:
        """Waits until consumers have dealt with everything.

        Raises:
            SpeculatorError: there is none, or one that refuses us.
        """
        try:
            self._sender.close()
        finally:
            self._clean_up()

    def abort(self) -> None:
        """Consumers are not told that this was all."""
        self._sender.stop()
        self._clean_up()


class QueueSource:
    """A `HoldingSource`: producers forget an example when the reader has dealt with it.

    What it has not dealt with is given again by the next `read` or `hold`. It goes to another
    consumer if this one is closed or lost.
    """

    def __init__(
        self, schema: Schema, receiver: Receiver, clean_up: Callable[[], None] = lambda: None
    ) -> None:
        self.schema = schema
        self.url = receiver.url
        self.capacity = receiver.room * receiver.num_producers
        self.while_waiting: Callable[[], None] = lambda: None
        """Called at every heartbeat or more often; what it raises ends the reader's wait."""
        self._receiver = receiver
        self._held: dict[str, Arrival] = {}
        self._clean_up = clean_up

    @property
    def num_refused(self) -> int:
        """Messages that were not what a producer of this schema sends."""
        return self._receiver.num_refused

    def read(self) -> Iterator[GeneratedExample]:
        """Ends when as many producers as are expected have sent everything.

        Raises:
            SpeculatorError: none of the others is there.
        """
        for example in self.hold():
            yield example
            self.done([example.key])

    def hold(self) -> Iterator[GeneratedExample]:
        """Raises SpeculatorError as `read`."""
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
        """Lets producers know that they have to send elsewhere."""
        self._receiver.close()
        self._clean_up()


def unique_name() -> str:
    """Of a producer, among all machines."""
    return f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"
