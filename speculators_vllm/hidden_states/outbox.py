"""A thread that takes hidden states to their sink, with room for a bounded number of bytes."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from speculators_core.errors import first_line
from speculators_vllm.hidden_states.files import FileWriter, HiddenStates
from speculators_vllm.hidden_states.settings import FileSink, StreamSink
from speculators_vllm.hidden_states.stream import StreamWriter

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """A way out, used by one thread; only `stop` is called from another."""

    def write(self, states: HiddenStates) -> None: ...
    def report(self, request_id: str, name: str, reason: str) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


def writer_for(sink: FileSink | StreamSink) -> Writer:
    return FileWriter(sink.folder) if isinstance(sink, FileSink) else StreamWriter(sink.endpoint)


@dataclass(frozen=True)
class Parcel:
    """States that may still be arriving in host memory."""

    states: HiddenStates
    wait: Callable[[], None]
    """Returns when they have arrived."""


@dataclass(frozen=True)
class Failure:
    """States that could not be taken from the device."""

    request_id: str
    name: str
    reason: str


class Outbox:
    """First in, first out."""

    def __init__(self, writer: Writer, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.in_flight_bytes = 0
        self.progress = threading.Event()
        """Set when states have left."""
        self._writer = writer
        self._queue: queue.SimpleQueue[Parcel | Failure | None] = queue.SimpleQueue()
        self._ended: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hidden-states", daemon=True)
        self._thread.start()

    def has_room(self, size_bytes: int) -> bool:
        """Whether as many bytes fit in; into an empty outbox anything does."""
        with self._lock:
            return (
                self.in_flight_bytes == 0
                or self.in_flight_bytes + size_bytes <= self.capacity_bytes
            )

    def put(self, item: Parcel | Failure) -> None:
        """Never waits; ask `has_room` first."""
        with self._lock:
            self.in_flight_bytes += item.states.size_bytes if isinstance(item, Parcel) else 0
        self._queue.put(item)

    def take_ended(self) -> dict[str, str | None]:
        """Requests whose states have left since the last call; why, where they could not."""
        with self._lock:
            ended, self._ended = self._ended, {}
        return ended

    def close(self, timeout_s: float) -> None:
        """Waits for what is in it, then gives up and says so for each request."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        self._writer.stop()
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            reason = self._carry(item)
            request_id = item.states.request_id if isinstance(item, Parcel) else item.request_id
            size_bytes = item.states.size_bytes if isinstance(item, Parcel) else 0
            del item  # its memory, while the next one is waited for
            if reason is not None:
                logger.error("hidden states of request %s were lost: %s", request_id, reason)
            with self._lock:
                self.in_flight_bytes -= size_bytes
                self._ended[request_id] = reason
            self.progress.set()
        self._writer.close()

    def _carry(self, item: Parcel | Failure) -> str | None:
        """Why it could not be done."""
        if isinstance(item, Failure):
            return self._report(item)
        try:
            item.wait()
            self._writer.write(item.states)
        except Exception as error:  # whatever it is, it is this request's alone
            states = item.states
            return self._report(Failure(states.request_id, states.name, first_line(error)))
        return None

    def _report(self, failure: Failure) -> str:
        try:
            self._writer.report(failure.request_id, failure.name, failure.reason)
        except Exception as error:
            return f"{failure.reason}; nor could that be reported: {first_line(error)}"
        return failure.reason


def wait_for_room(outbox: Outbox, size_bytes: int, deadline: float) -> bool:
    """Whether there is room before ``time.monotonic()`` reaches the deadline."""
    while not outbox.has_room(size_bytes):
        if time.monotonic() > deadline:
            return False
        outbox.progress.wait(0.05)
        outbox.progress.clear()
    return True
