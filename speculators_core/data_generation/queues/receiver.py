"""The consumer's side of a queue.

It admits producers, holds the examples that they send, and refuses everything else. The number of
held examples is bounded: each of ``num_producers`` gets its share of ``queue_size``, and examples
beyond that are refused. Every example is processed once, by its key:

    new               -> held
    held              -> acknowledged together with the one held
    processed before  -> acknowledged at once, not held

Only unacknowledged examples can come again: those under way when a producer or a consumer was
lost, and those that a producer's journal did not list yet. The last `REMEMBERED` keys therefore
suffice, however long the run.

While a reader holds unacknowledged examples, `take` returns None when no more can come: each
producer has sent everything, or as much as there is room for.
"""

import hashlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq

from speculators_core.data_generation.examples import GeneratedExample
from speculators_core.data_generation.queues.frames import (
    FrameError,
    Hello,
    Kind,
    Label,
    Message,
    Reason,
    Welcome,
    pack,
    unpack,
)
from speculators_core.data_generation.queues.io_thread import IoThread
from speculators_core.data_generation.settings import SyncConfig
from speculators_core.errors import SpeculatorError

logger = logging.getLogger(__name__)

REMEMBERED = 2**18
"""Number of processed keys that are remembered, 16 bytes each."""
MAX_FRAMES = 64
"""Frames kept of one message; a message with more is refused."""
TURN = 64
"""Maximum number of messages handled per turn."""
COMPLAINTS = 256
"""Maximum number of refused peers that are logged."""
MAX_REASON = 500
"""Maximum characters of a refusal's reason, which may quote the message."""
LEAVING_S = 1.0

Unpack = Callable[[Label, Sequence[memoryview]], Callable[[], GeneratedExample | None]]
"""Checks a message's tensors, or raises FrameError. The function that it returns gives the example,
or None where the producer has reused its memory."""


@dataclass
class Producer:
    """A producer that was admitted."""

    name: str
    session: int
    number: int = 0
    """Number of its next message."""
    num_held: int = 0
    is_closing: bool = False
    """Whether it has sent everything."""
    has_ended: bool = False
    heard: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Receipt:
    """The address of an acknowledgement."""

    peer: bytes
    session: int
    number: int


@dataclass
class Arrival:
    """An example that has not been acknowledged."""

    digest: bytes
    load: Callable[[], GeneratedExample | None]
    receipts: list[Receipt]


class Receiver:
    """Receives examples from producers; ``open_socket`` makes a bound ROUTER socket."""

    def __init__(
        self,
        expected: Hello,
        sync: SyncConfig,
        num_producers: int,
        timeout_s: float,
        open_socket: Callable[[zmq.Context], zmq.Socket],
        unpack_tensors: Unpack,
    ) -> None:
        self.expected = expected
        self.num_producers = num_producers
        self.queue_size = sync.queue_size
        self.room = max(1, sync.queue_size // num_producers)
        """Maximum number of unacknowledged examples per producer."""
        self.max_message_bytes = sync.max_message_bytes
        self.timeout_s = timeout_s
        self.num_refused = 0
        """Number of refused messages."""
        self._unpack_tensors = unpack_tensors
        self._producers: dict[bytes, Producer] = {}
        self._lost: dict[str, None] = {}
        self._ended: set[str] = set()
        self._queue: deque[Arrival] = deque()
        self._open: dict[bytes, Arrival] = {}
        """Examples in the queue or with the reader, by digest of their key."""
        self._dealt: dict[bytes, None] = {}
        self._settled: deque[Receipt] = deque()
        self._complained: set[bytes] = set()
        self._has_warned = False
        self._io = IoThread(sync.heartbeat_s, LEAVING_S)
        try:
            self._socket = open_socket(self._io.context)
        except Exception:
            self._io.stop()
            raise
        endpoint = self._socket.last_endpoint
        assert isinstance(endpoint, bytes)
        self.url = endpoint.decode()
        self._io.poller.register(self._socket, zmq.POLLIN)
        self._io.start(self._turn, self._beat, self._leave)

    # Called from other threads.

    def take(
        self, is_holding: bool = False, while_waiting: Callable[[], None] = lambda: None
    ) -> Arrival | None:
        """The next example; None when all producers have ended.

        ``is_holding``: the reader has unacknowledged examples. It also gets None when no more can
        come before it acknowledges some. ``while_waiting`` is called at least once per heartbeat;
        an exception from it ends the wait.

        Raises:
            SpeculatorError: the remaining producers were silent for ``timeout_s``.
        """
        with self._io.changed:
            self._io.check()
            last_there = time.monotonic()
            while not self._queue:
                while_waiting()
                if len(self._ended) >= self.num_producers:
                    return None
                if is_holding and self._all_rest():
                    return None
                if self._num_active():
                    last_there = time.monotonic()
                elif time.monotonic() - last_there > self.timeout_s:
                    raise SpeculatorError(self._missing())
                self._io.wait(self.timeout_s / 4)
            return self._queue.popleft()

    def put_back(self, arrival: Arrival) -> None:
        with self._io.changed:
            if self._open.get(arrival.digest) is arrival:
                self._queue.appendleft(arrival)

    def settle(self, arrival: Arrival) -> None:
        """Acknowledges an example, so that its producer can release it."""
        with self._io.changed:
            self._open.pop(arrival.digest, None)
            self._dealt[arrival.digest] = None
            if len(self._dealt) > REMEMBERED:
                del self._dealt[next(iter(self._dealt))]
            self._settled.extend(arrival.receipts)
        self._io.wake()

    def close(self) -> None:
        """Notifies the producers, which send unacknowledged examples to other consumers."""
        self._io.stop()

    def _num_active(self) -> int:
        return sum(not producer.has_ended for producer in self._producers.values())

    def _all_rest(self) -> bool:
        """Whether no producer can send more before one of its examples is acknowledged."""
        if self._settled:
            return False
        active = [producer for producer in self._producers.values() if not producer.has_ended]
        full = [p for p in active if p.num_held >= self.room and not p.is_closing]
        if not all(producer.is_closing or producer in full for producer in active):
            return False
        if full and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "sync.queue_size %d is too small for the examples that its reader holds at a time, "
                "so rows are emitted before they are full. Increase it.",
                self.queue_size,
            )
        return True

    def _missing(self) -> str:
        num_missing = self.num_producers - len(self._ended)
        lost = f"lost: {', '.join(self._lost)}" if self._lost else "never seen"
        return (
            f"{self.url}: {num_missing} of {self.num_producers} producers have not finished and "
            f"were silent for {self.timeout_s:g} s ({lost}). "
            "Start them again, or expect fewer producers."
        )

    # Called from the socket thread.

    def _turn(self) -> None:
        for _ in range(TURN):
            try:
                peer, *frames = self._receive()
            except zmq.Again:
                break
            self._handle(bytes(peer), frames)
        self._acknowledge_settled()

    def _beat(self) -> None:
        for peer, producer in list(self._producers.items()):
            if self._io.is_silent(producer.heard):
                self._forget(peer)
            else:
                self._say(peer, Message(Kind.BEAT, producer.session))

    def _leave(self) -> None:
        self._acknowledge_settled()
        for peer in self._producers:
            self._say(peer, Message(Kind.WAIT, body=Reason(reason="the consumer has left")))

    def _receive(self) -> list[memoryview]:
        frame = self._socket.recv(zmq.NOBLOCK, copy=False)
        frames = [frame.buffer]
        while frame.more:
            frame = self._socket.recv(copy=False)
            if len(frames) < MAX_FRAMES:
                frames.append(frame.buffer)
        return frames

    def _handle(self, peer: bytes, frames: list[memoryview]) -> None:
        producer = self._producers.get(peer)
        try:
            message = unpack(frames, self.max_message_bytes)
            if message.kind == Kind.HELLO:
                self._greet(peer, message)
            elif producer is None:
                self._say(peer, Message(Kind.WAIT, body=Reason(reason="not admitted yet")))
            else:
                self._listen(peer, producer, message)
        except FrameError as error:
            self._refuse(peer, str(error))

    def _greet(self, peer: bytes, message: Message) -> None:
        hello = message.body
        assert isinstance(hello, Hello)
        if peer in self._producers:
            raise FrameError("a second hello")
        if difference := self._difference(hello):
            raise FrameError(difference)
        if reason := self._why_not_now(hello.name):
            self._say(peer, Message(Kind.WAIT, body=Reason(reason=reason)))
            return
        producer = Producer(hello.name, secrets.randbits(64))
        self._producers[peer] = producer
        self._ended.discard(hello.name)
        self._lost.pop(hello.name, None)
        welcome = Welcome(room=self.room, max_message_bytes=self.max_message_bytes)
        self._say(peer, Message(Kind.WELCOME, producer.session, body=welcome))
        logger.info("admitted producer %s", hello.name)

    def _difference(self, hello: Hello) -> str | None:
        if hello.store != self.expected.store:
            return f"its store is {hello.store}, expected {self.expected.store}"
        theirs, ours = hello.holds.model_dump(), self.expected.holds.model_dump()
        for name, expected in ours.items():
            if theirs[name] != expected:
                return f"its {name} is {theirs[name]!r}, expected {expected!r}"
        return None

    def _why_not_now(self, name: str) -> str | None:
        active = [p.name for p in self._producers.values() if not p.has_ended]
        if name in active:
            return f"a producer named {name!r} is already connected"
        if len(active) >= self.num_producers:
            return f"all {self.num_producers} expected producers are already connected"
        return None

    def _listen(self, peer: bytes, producer: Producer, message: Message) -> None:
        if message.session != producer.session:
            raise FrameError("its session is not the current one")
        producer.heard = time.monotonic()
        if message.kind == Kind.BEAT:
            return
        if message.kind == Kind.CLOSING and not producer.has_ended:
            producer.is_closing = True
            return
        if message.kind not in (Kind.EXAMPLE, Kind.END) or producer.has_ended:
            raise FrameError(f"{message.kind.name} was not expected")
        if message.number != producer.number:
            raise FrameError(f"message number {message.number}, expected {producer.number}")
        receipt = Receipt(peer, message.session, message.number)
        if message.kind == Kind.END:
            if producer.num_held:
                raise FrameError(f"END with {producer.num_held} unacknowledged examples")
            self._end(producer, receipt)
        else:
            if producer.num_held >= self.room:
                raise FrameError(f"more than {self.room} unacknowledged examples")
            self._take_in(producer, message, receipt)
        producer.number += 1

    def _end(self, producer: Producer, receipt: Receipt) -> None:
        producer.has_ended = True
        self._ended.add(producer.name)
        self._settled.append(receipt)
        logger.info("%s has sent everything", producer.name)

    def _take_in(self, producer: Producer, message: Message, receipt: Receipt) -> None:
        label = message.body
        assert isinstance(label, Label)
        load = self._unpack_tensors(label, message.payload)
        producer.num_held += 1
        digest = hashlib.blake2b(label.key.encode(), digest_size=16).digest()
        if digest in self._dealt:
            self._settled.append(receipt)
        elif digest in self._open:
            self._open[digest].receipts.append(receipt)
        else:
            self._open[digest] = Arrival(digest, load, [receipt])
            self._queue.append(self._open[digest])

    def _acknowledge_settled(self) -> None:
        while self._settled:
            self._acknowledge(self._settled.popleft())

    def _acknowledge(self, receipt: Receipt) -> None:
        producer = self._producers.get(receipt.peer)
        if producer is None or producer.session != receipt.session:
            return
        if not producer.has_ended:
            producer.num_held -= 1
        self._say(receipt.peer, Message(Kind.ACK, receipt.session, receipt.number))

    def _refuse(self, peer: bytes, reason: str) -> None:
        self.num_refused += 1
        reason = reason[:MAX_REASON]
        if peer not in self._complained and len(self._complained) < COMPLAINTS:
            self._complained.add(peer)
            name = self._producers[peer].name if peer in self._producers else peer.hex()
            logger.warning("refused a message from %s: %s", name, reason)
        self._say(peer, Message(Kind.REFUSED, body=Reason(reason=reason)))
        self._forget(peer)

    def _forget(self, peer: bytes) -> None:
        """Drops a producer and its unread examples, which will be sent again."""
        producer = self._producers.pop(peer, None)
        if producer is None or producer.has_ended:
            return
        self._lost[producer.name] = None
        if len(self._lost) > self.num_producers:
            del self._lost[next(iter(self._lost))]
        for arrival in list(self._open.values()):
            arrival.receipts = [r for r in arrival.receipts if r.peer != peer]
        for arrival in [a for a in self._queue if not a.receipts]:
            self._queue.remove(arrival)
            del self._open[arrival.digest]
        logger.warning("lost %s, which has not finished", producer.name)

    def _say(self, peer: bytes, message: Message) -> None:
        try:
            self._socket.send_multipart([peer, *pack(message)], zmq.NOBLOCK)
        except zmq.Again:
            pass  # an unresponsive peer is dropped after missed heartbeats
