"""The consumer's side of a queue: lets producers in, holds what they send, refuses all else.

What is held is bounded: each of ``num_producers`` gets room for its share of ``queue_size``, and
what a producer sends over that is refused. Every example is dealt with once:

    key       of a new example      -> held
              of one that is held   -> acknowledged together with it
              dealt with before     -> acknowledged at once, not held

Only what was not acknowledged can come again: the examples that were under way when a producer or
a consumer was lost, and those of which a producer's journal did not know yet. So the last
`REMEMBERED` keys are enough to tell, however long the run.

A reader may hold examples that it has not dealt with. While it does, it is told when no more can
come: each producer has sent everything, or as much as there is room for.
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
"""Keys that were dealt with, as 16 bytes each."""
MAX_FRAMES = 64
"""Kept of one message; one with more is refused."""
TURN = 64
"""Messages that are looked at before others get their turn."""
COMPLAINTS = 256
"""Peers of which a log line says that they were refused."""
MAX_REASON = 500
"""Characters; a part of what was refused may stand in it."""
GOODBYE_S = 1.0

Unpack = Callable[[Label, Sequence[memoryview]], Callable[[], GeneratedExample | None]]
"""Checks a message's tensors, or raises FrameError; what comes back gives the example, or nothing
where its memory was taken back."""


@dataclass
class Producer:
    """One that was let in."""

    name: str
    session: int
    number: int = 0
    """Of its next message."""
    num_held: int = 0
    is_closing: bool = False
    """Whether it has sent everything."""
    has_ended: bool = False
    heard: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Receipt:
    """Where an acknowledgement goes."""

    peer: bytes
    session: int
    number: int


@dataclass
class Arrival:
    """An example that has not been dealt with."""

    digest: bytes
    load: Callable[[], GeneratedExample | None]
    receipts: list[Receipt]


class Receiver:
    """``open_socket`` makes a bound ROUTER."""

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
        """Examples that each producer may have under way."""
        self.max_message_bytes = sync.max_message_bytes
        self.timeout_s = timeout_s
        self.num_refused = 0
        """Messages."""
        self._unpack_tensors = unpack_tensors
        self._producers: dict[bytes, Producer] = {}
        self._lost: dict[str, None] = {}
        self._ended: set[str] = set()
        self._queue: deque[Arrival] = deque()
        self._open: dict[bytes, Arrival] = {}
        """Held or with the reader."""
        self._dealt: dict[bytes, None] = {}
        self._settled: deque[Receipt] = deque()
        self._complained: set[bytes] = set()
        self._has_warned = False
        self._io = IoThread(sync.heartbeat_s, GOODBYE_S)
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

    # What other threads call.

    def take(
        self, is_holding: bool = False, while_waiting: Callable[[], None] = lambda: None
    ) -> Arrival | None:
        """The next one; None when all producers have ended.

        ``is_holding``: the reader has some that it has not dealt with. It gets None, too, when no
        more come before it has. ``while_waiting`` is called at every heartbeat or more often; what
        it raises ends the wait.

        Raises:
            SpeculatorError: nothing was heard for ``timeout_s`` of those that have not.
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
        """It has been dealt with: the producer may forget it."""
        with self._io.changed:
            self._open.pop(arrival.digest, None)
            self._dealt[arrival.digest] = None
            if len(self._dealt) > REMEMBERED:
                del self._dealt[next(iter(self._dealt))]
            self._settled.extend(arrival.receipts)
        self._io.ring()

    def close(self) -> None:
        """Tells the producers, which send to others what was not dealt with."""
        self._io.stop()

    def _num_active(self) -> int:
        return sum(not producer.has_ended for producer in self._producers.values())

    def _all_rest(self) -> bool:
        """Whether none that is here sends more before one of its examples is acknowledged."""
        if self._settled:
            return False
        active = [producer for producer in self._producers.values() if not producer.has_ended]
        full = [p for p in active if p.num_held >= self.room and not p.is_closing]
        if not all(producer.is_closing or producer in full for producer in active):
            return False
        if full and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "sync.queue_size %d is too small for what its reader holds at one time: rows go "
                "out before they are full. Make it larger.",
                self.queue_size,
            )
        return True

    def _missing(self) -> str:
        num_missing = self.num_producers - len(self._ended)
        lost = f"lost: {', '.join(self._lost)}" if self._lost else "never seen"
        return (
            f"{self.url}: {num_missing} of {self.num_producers} producers have not finished and "
            f"nothing was heard of them for {self.timeout_s:g} s ({lost}). "
            "Start them again, or expect fewer."
        )

    # What the thread calls.

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
                self._say(peer, Message(Kind.WAIT, body=Reason(reason="not let in yet")))
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
        logger.info("let in %s", hello.name)

    def _difference(self, hello: Hello) -> str | None:
        if hello.store != self.expected.store:
            return f"it is a producer of {hello.store}, expected one of {self.expected.store}"
        theirs, ours = hello.holds.model_dump(), self.expected.holds.model_dump()
        for name, expected in ours.items():
            if theirs[name] != expected:
                return f"it has {name} {theirs[name]!r}, expected {expected!r}"
        return None

    def _why_not_now(self, name: str) -> str | None:
        active = [p.name for p in self._producers.values() if not p.has_ended]
        if name in active:
            return f"a producer {name!r} is here already"
        if len(active) >= self.num_producers:
            return f"all {self.num_producers} producers that are expected are here already"
        return None

    def _listen(self, peer: bytes, producer: Producer, message: Message) -> None:
        if message.session != producer.session:
            raise FrameError("it is of another session")
        producer.heard = time.monotonic()
        if message.kind == Kind.BEAT:
            return
        if message.kind == Kind.CLOSING and not producer.has_ended:
            producer.is_closing = True
            return
        if message.kind not in (Kind.EXAMPLE, Kind.END) or producer.has_ended:
            raise FrameError(f"{message.kind.name} was not expected")
        if message.number != producer.number:
            raise FrameError(f"message {message.number}, expected {producer.number}")
        receipt = Receipt(peer, message.session, message.number)
        if message.kind == Kind.END:
            if producer.num_held:
                raise FrameError(f"the end, while {producer.num_held} examples are held")
            self._end(producer, receipt)
        else:
            if producer.num_held >= self.room:
                raise FrameError(f"over {self.room} examples")
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
            logger.warning("refused a message of %s: %s", name, reason)
        self._say(peer, Message(Kind.REFUSED, body=Reason(reason=reason)))
        self._forget(peer)

    def _forget(self, peer: bytes) -> None:
        """Lets go of what it sent and nobody has begun with: it will be sent again."""
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
            pass  # it does not listen, and will be forgotten
