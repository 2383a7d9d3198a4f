"""A queue's socket thread: ZeroMQ sockets are not thread-safe."""

import logging
import os
import threading
import time
from collections.abc import Callable

import zmq

from speculators_core.errors import SpeculatorError, first_line

logger = logging.getLogger(__name__)

SILENT_BEATS = 3
"""Heartbeats that a peer may miss."""
CLOSING_S = 5.0
"""Time that ZeroMQ may take to close sockets, in addition to the linger time."""


class IoThread:
    """Takes a turn when a socket has a message, when woken, and at every heartbeat.

    A turn holds ``changed``, the lock of all state that the owner shares with other threads, and
    notifies those that wait on it.
    """

    def __init__(self, heartbeat_s: float, linger_s: float = 0.0) -> None:
        """``linger_s``: time for the last messages to be sent when the thread stops."""
        self.heartbeat_s = heartbeat_s
        self.linger_s = linger_s
        self.changed = threading.Condition()
        self.fault: BaseException | None = None
        self.context = zmq.Context()
        self.poller = zmq.Poller()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.poller.register(self._wake_read, zmq.POLLIN)
        self.is_stopping = False
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    def start(
        self,
        turn: Callable[[], None],
        beat: Callable[[], None],
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        calls = (turn, beat, leave)
        self._thread = threading.Thread(
            target=self._run, args=calls, name="example-queue", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """Requests a turn."""
        if self._is_stopped:
            return
        try:
            os.write(self._wake_write, b"!")
        except BlockingIOError:
            pass  # enough wake-ups are pending

    def wait(self, up_to_s: float) -> None:
        """Waits until the next turn is over; the caller holds ``changed``.

        Raises:
            SpeculatorError: the thread has failed.
        """
        self.changed.wait(min(up_to_s, self.heartbeat_s))
        self.check()

    def check(self) -> None:
        """Raises SpeculatorError if the thread has failed or was stopped."""
        if isinstance(self.fault, SpeculatorError):
            raise SpeculatorError(str(self.fault)) from self.fault
        if self.fault is not None:
            raise SpeculatorError(
                f"The queue's socket thread failed: {first_line(self.fault)}. Start both sides "
                "again; a producer with a journal resumes with --run.resume."
            ) from self.fault
        if self.is_stopping:
            raise SpeculatorError("The queue is closed, expected an open one. Open it again.")

    def is_silent(self, heard: float) -> bool:
        """Whether a peer last heard at that time is considered lost."""
        return time.monotonic() - heard > SILENT_BEATS * self.heartbeat_s

    def stop(self) -> None:
        """Closes the sockets. Can be called twice."""
        if self._is_stopped:
            return
        with self.changed:
            self.is_stopping = True
            self.changed.notify_all()
        self.wake()
        if self._thread is not None:
            self._thread.join()
        else:
            self._close_sockets()
        self._is_stopped = True
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(
        self, turn: Callable[[], None], beat: Callable[[], None], leave: Callable[[], None]
    ) -> None:
        next_beat = 0.0
        try:
            while not self.is_stopping:
                self.poller.poll(max(0, int(1000 * (next_beat - time.monotonic()) + 1)))
                self._drain_wakeups()
                with self.changed:
                    turn()
                    if time.monotonic() >= next_beat:
                        beat()
                        next_beat = time.monotonic() + self.heartbeat_s
                    self.changed.notify_all()
            with self.changed:
                leave()
        except Exception as error:  # waiting threads must see any failure
            with self.changed:
                self.fault = error
                self.changed.notify_all()
        finally:
            self._close_sockets()

    def _close_sockets(self) -> None:
        """Waits a limited time: libzmq 4.3.5 was once seen to hang with all sockets closed."""
        end = threading.Thread(target=self._destroy, name="example-queue-end", daemon=True)
        end.start()
        end.join(self.linger_s + CLOSING_S)
        if end.is_alive():
            logger.warning("ZeroMQ did not close a socket within %g s; left it open", CLOSING_S)

    def _destroy(self) -> None:
        self.context.destroy(linger=int(1000 * self.linger_s))

    def _drain_wakeups(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            pass
