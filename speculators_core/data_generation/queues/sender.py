"""The producer's side of a queue.

It sends examples as consumers have room, and keeps each until it is acknowledged. An example is
under way to one consumer at a time; when that one falls silent, restarts or leaves, its
unacknowledged examples go to another.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import zmq

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

NO_ANSWER = "no answer"


@dataclass(frozen=True)
class QueuedExample:
    """An example on its way."""

    label: Label
    payload: tuple[memoryview, ...]
    release: Callable[[], None]
    """Called when the example is acknowledged."""


@dataclass
class Line:
    """The connection to one consumer."""

    url: str
    socket: zmq.Socket
    heard: float = field(default_factory=time.monotonic)
    session: int | None = None
    room: int = 0
    number: int = 0
    """Number of the next message."""
    under_way: dict[int, QueuedExample] = field(default_factory=dict)
    end: int | None = None
    """Number of the last message."""
    is_told: bool = False
    """Whether the consumer has acknowledged the end."""
    knows_closing: bool = False
    """Whether CLOSING was sent to the consumer."""
    has_met: bool = False
    """Whether the consumer ever admitted this producer."""
    reason: str = NO_ANSWER
    """Why there is no session."""


class Sender:
    """Sends examples to consumers; call `put` only after `wait_for_room`.

    ``open_socket`` makes a connected socket for a URL.
    """

    def __init__(
        self,
        urls: Sequence[str],
        hello: Hello,
        sync: SyncConfig,
        timeout_s: float,
        open_socket: Callable[[zmq.Context, str], zmq.Socket],
    ) -> None:
        self.hello = hello
        self.max_message_bytes = sync.max_message_bytes
        self.timeout_s = timeout_s
        self._open_socket = open_socket
        self._io = IoThread(sync.heartbeat_s)
        self._waiting: deque[QueuedExample] = deque()
        self._acknowledged: list[str] = []
        self._is_closing = False
        self._is_ending = False
        try:
            self._lines = [Line(url, self._connect(url)) for url in urls]
        except Exception:
            self._io.stop()
            raise
        self._io.start(self._turn, self._beat)

    # Called from other threads.

    def wait_for_room(self) -> None:
        """Raises:
        SpeculatorError: a consumer refused this producer, or none answered for ``timeout_s``.
        """
        with self._io.changed:
            self._wait(lambda: self._room() > 0)

    def put(self, example: QueuedExample) -> None:
        with self._io.changed:
            self._io.check()
            self._waiting.append(example)
        self._io.wake()

    def take_acknowledged(self) -> list[str]:
        with self._io.changed:
            taken, self._acknowledged = self._acknowledged, []
        return taken

    def close(self) -> None:
        """Returns when everything, and the end of the data, has been acknowledged.

        Raises:
            SpeculatorError: as for `wait_for_room`.
        """
        if self._io.is_stopping:
            return
        try:
            with self._io.changed:
                self._is_closing = True
                self._io.wake()
                self._wait(lambda: not self._waiting and not any(x.under_way for x in self._lines))
                self._is_ending = True
                self._io.wake()
                self._wait_until_told()
        finally:
            self._io.stop()

    def stop(self) -> None:
        """Stops at once; a waiting `wait_for_room` raises."""
        self._io.stop()

    def _room(self) -> int:
        """Room left; negative while a lost consumer's examples wait for another one."""
        there = (line for line in self._lines if line.session is not None)
        return sum(line.room - len(line.under_way) for line in there) - len(self._waiting)

    def _wait(self, is_so: Callable[[], bool]) -> None:
        self._io.check()
        last_there = time.monotonic()
        while not is_so():
            if any(line.session is not None for line in self._lines):
                last_there = time.monotonic()
            elif time.monotonic() - last_there > self.timeout_s:
                raise SpeculatorError(self._nobody())
            self._io.wait(self.timeout_s / 4)

    def _wait_until_told(self) -> None:
        """Waits for consumers that are connected or never were; those that left are skipped."""
        deadline = time.monotonic() + self.timeout_s
        while missing := [
            line.url
            for line in self._lines
            if not line.is_told and not (line.has_met and line.session is None)
        ]:
            if time.monotonic() > deadline:
                logger.warning("%s did not acknowledge the end of the data", ", ".join(missing))
                return
            self._io.wait(self.timeout_s / 4)

    def _nobody(self) -> str:
        reasons = "; ".join(f"{line.url}: {line.reason}" for line in self._lines)
        return (
            f"No consumer took examples for {self.timeout_s:g} s ({reasons}). Check that training "
            "is running, and that sync.urls and the keys are the same on both sides."
        )

    # Called from the socket thread.

    def _turn(self) -> None:
        for line in self._lines:
            while (message := self._receive(line)) is not None:
                line.heard = time.monotonic()
                self._handle(line, message)
        while self._waiting:
            there = [x for x in self._lines if x.session is not None and len(x.under_way) < x.room]
            if not there:
                break
            self._send(min(there, key=lambda x: len(x.under_way)), self._waiting.popleft())
        if self._is_closing:
            for line in self._lines:
                if line.session is not None and not line.knows_closing:
                    line.knows_closing = True
                    self._say(line, Kind.CLOSING)
        if self._is_ending:
            for line in self._lines:
                if line.session is not None and line.end is None:
                    line.end = line.number
                    self._say(line, Kind.END, line.number)

    def _beat(self) -> None:
        for line in self._lines:
            if self._io.is_silent(line.heard):
                self._start_over(line, NO_ANSWER)
            elif line.session is not None:
                self._say(line, Kind.BEAT)
            elif line.reason != NO_ANSWER:
                self._greet(line.socket)

    def _receive(self, line: Line) -> Message | None:
        try:
            frames = line.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        try:
            return unpack([frame.buffer for frame in frames], 0)
        except FrameError as error:
            raise SpeculatorError(
                f"{line.url} is not a consumer of this protocol: {error}. Check the addresses in "
                "sync.urls, and use the same package version on both sides."
            ) from error

    def _handle(self, line: Line, message: Message) -> None:
        match message.kind, message.body:
            case Kind.REFUSED, Reason(reason=reason):
                raise SpeculatorError(
                    f"{line.url} refused producer {self.hello.name}: {reason}. Use the same "
                    "configuration for training and generate-data."
                )
            case Kind.WELCOME, Welcome() as welcome:
                self._begin(line, message.session, welcome)
            case Kind.WAIT, Reason(reason=reason) if line.session is None:
                line.reason = reason
            case Kind.WAIT, Reason(reason=reason):
                self._start_over(line, reason)
            case Kind.ACK, _ if message.session == line.session:
                if message.number == line.end:
                    line.is_told = True
                elif example := line.under_way.pop(message.number, None):
                    self._acknowledged.append(example.label.key)
                    example.release()

    def _begin(self, line: Line, session: int, welcome: Welcome) -> None:
        if welcome.max_message_bytes < self.max_message_bytes:
            raise SpeculatorError(
                f"{line.url} accepts messages of {welcome.max_message_bytes} bytes, expected "
                f"{self.max_message_bytes} as here. Set the same sync.max_message_bytes on both "
                "sides."
            )
        line.session, line.room, line.has_met = session, welcome.room, True
        logger.info("%s takes %d examples at a time", line.url, welcome.room)

    def _send(self, line: Line, example: QueuedExample) -> None:
        line.under_way[line.number] = example
        self._say(line, Kind.EXAMPLE, line.number, example)
        line.number += 1

    def _say(
        self, line: Line, kind: Kind, number: int = 0, example: QueuedExample | None = None
    ) -> None:
        body, payload = (example.label, example.payload) if example else (None, ())
        message = Message(kind, line.session or 0, number, body, payload)
        line.socket.send_multipart(pack(message), zmq.NOBLOCK, copy=False)

    def _greet(self, socket: zmq.Socket) -> None:
        # Between two attempts to connect there is no one to send to; the next beat greets again.
        with suppress(zmq.Again):
            socket.send_multipart(pack(Message(Kind.HELLO, body=self.hello)), zmq.NOBLOCK)

    def _connect(self, url: str) -> zmq.Socket:
        socket = self._open_socket(self._io.context, url)
        self._io.poller.register(socket, zmq.POLLIN)
        self._greet(socket)
        return socket

    def _start_over(self, line: Line, reason: str) -> None:
        """Opens a new socket, through which no message of the old session can arrive."""
        if line.session is not None and not line.is_told:
            logger.warning(
                "lost %s (%s): resending %d examples", line.url, reason, len(line.under_way)
            )
        self._waiting.extendleft(reversed(line.under_way.values()))
        self._io.poller.unregister(line.socket)
        line.socket.close(linger=0)
        renewed = Line(line.url, self._connect(line.url), has_met=line.has_met, reason=reason)
        vars(line).update(vars(renewed))
