"""A thread that sends hidden states, with bounded memory."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from speculators_core.errors import first_line
from speculators_vllm.hidden_states.files import FileWriter, HiddenStates
from speculators_vllm.hidden_states.settings import FileSink, StreamSink
from speculators_vllm.hidden_states.stream import StreamWriter

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Writes to a sink, in one thread; only `stop` is called from another."""

    def write(self, states: HiddenStates) -> None: ...
    def report(self, request_id: str, name: str, reason: str) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


def writer_for(sink: FileSink | StreamSink) -> Writer:
    return FileWriter(sink.folder) if isinstance(sink, FileSink) else StreamWriter(sink.endpoint)


@dataclass(frozen=True)
class PendingStates:
    """States whose copy to host memory may still be running."""

    states: HiddenStates
    wait: Callable[[], None]
    """Returns when the copy is complete."""

    @property
    def request_id(self) -> str:
        return self.states.request_id

    @property
    def size_bytes(self) -> int:
        return self.states.size_bytes


@dataclass(frozen=True)
class Failure:
    """States that could not be copied from the device."""

    request_id: str
    name: str
    reason: str
    size_bytes: ClassVar[int] = 0


class Outbox:
    """Sends states one after another, in the order in which they came."""

    def __init__(self, writer: Writer, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.in_flight_bytes = 0
        self.progress = threading.Event()
        """Set when states have been sent."""
        self._writer = writer
        self._queue: queue.SimpleQueue[PendingStates | Failure | None] = queue.SimpleQueue()
        self._ended: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hidden-states", daemon=True)
        self._thread.start()

    def has_room(self, size_bytes: int) -> bool:
        """Whether so many bytes fit; in an empty outbox any number does."""
        with self._lock:
            return (
                self.in_flight_bytes == 0
                or self.in_flight_bytes + size_bytes <= self.capacity_bytes
            )

    def put(self, item: PendingStates | Failure) -> None:
        """Never waits; ask `has_room` first."""
        with self._lock:
            self.in_flight_bytes += item.size_bytes
        self._queue.put(item)

    def take_ended(self) -> dict[str, str | None]:
        """Requests that ended since the last call: None where sent, else why they were lost."""
        with self._lock:
            ended, self._ended = self._ended, {}
        return ended

    def close(self, timeout_s: float) -> None:
        """Waits until all is sent; after the timeout the rest is lost, and each is reported."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        self._writer.stop()
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            reason = self._send(item)
            request_id, size_bytes = item.request_id, item.size_bytes
            del item  # its memory, while the next one is waited for
            if reason is not None:
                logger.error("hidden states of request %s were lost: %s", request_id, reason)
            with self._lock:
                self.in_flight_bytes -= size_bytes
                self._ended[request_id] = reason
            self.progress.set()
        self._writer.close()

    def _send(self, item: PendingStates | Failure) -> str | None:
        """The reason where it failed."""
        if isinstance(item, Failure):
            return self._report(item)
        try:
            item.wait()
            self._writer.write(item.states)
        except Exception as error:  # whatever it is, it concerns this request alone
            states = item.states
            return self._report(Failure(states.request_id, states.name, first_line(error)))
        return None

    def _report(self, failure: Failure) -> str:
        try:
            self._writer.report(failure.request_id, failure.name, failure.reason)
        except Exception as error:
            return f"{failure.reason}; the report failed too: {first_line(error)}"
        return failure.reason


def wait_for_room(outbox: Outbox, size_bytes: int, deadline: float) -> bool:
    """Whether there is room before ``time.monotonic()`` reaches the deadline."""
    while not outbox.has_room(size_bytes):
        if time.monotonic() > deadline:
            return False
        outbox.progress.wait(0.05)
        outbox.progress.clear()
    return True
