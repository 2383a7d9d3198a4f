"""The two ends of a queue of examples, whichever way their bytes go."""

import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence

from jaxtyping import Shaped
from torch import Tensor

from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.queues.frames import Label
from speculators_core.data_generation.queues.receiver import Receiver
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
    """A `DataSource`. An example is acknowledged when the next one is asked for.

    One that a reader leaves the loop with is given again by the next `read`. It goes to another
    consumer if this one is closed or lost.
    """

    def __init__(
        self, schema: Schema, receiver: Receiver, clean_up: Callable[[], None] = lambda: None
    ) -> None:
        self.schema = schema
        self.url = receiver.url
        self._receiver = receiver
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
        while (arrival := self._receiver.take()) is not None:
            example = arrival.load()
            if example is not None:
                try:
                    yield example
                except GeneratorExit:
                    self._receiver.put_back(arrival)
                    raise
            self._receiver.settle(arrival)

    def close(self) -> None:
        """Lets producers know that they have to send elsewhere."""
        self._receiver.close()
        self._clean_up()


def unique_name() -> str:
    """Of a producer, among all machines."""
    return f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"
