"""The thread in which the sockets of a queue live: ZeroMQ's may not be shared between threads."""

import logging
import os
import threading
import time
from collections.abc import Callable

import zmq

from speculators_core.errors import SpeculatorError, first_line

logger = logging.getLogger(__name__)

SILENT_BEATS = 3
"""Heartbeats that may be missed."""
CLOSING_S = 5.0
"""What ZeroMQ may take to close sockets, beside the time for last words."""


class IoThread:
    """Takes turns: when a socket has something, when it is rung, and at every heartbeat.

    A turn holds ``changed``, the lock of all that the owner shares with other threads, and tells
    those that wait on it.
    """

    def __init__(self, heartbeat_s: float, linger_s: float = 0.0) -> None:
        """Last words may take ``linger_s`` to leave."""
        self.heartbeat_s = heartbeat_s
        self.linger_s = linger_s
        self.changed = threading.Condition()
        self.fault: BaseException | None = None
        self.context = zmq.Context()
        self.poller = zmq.Poller()
        self._bell, self._rope = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._rope, False)
        self.poller.register(self._bell, zmq.POLLIN)
        self.is_stopping = False
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    def start(
        self,
        turn: Callable[[], None],
        beat: Callable[[], None],
        say_goodbye: Callable[[], None] = lambda: None,
    ) -> None:
        calls = (turn, beat, say_goodbye)
        self._thread = threading.Thread(
            target=self._run, args=calls, name="example-queue", daemon=True
        )
        self._thread.start()

    def ring(self) -> None:
        """Asks for a turn."""
        if self._is_stopped:
            return
        try:
            os.write(self._rope, b"!")
        except BlockingIOError:
            pass  # rung often enough

    def wait(self, up_to_s: float) -> None:
        """Until the next turn is over, with ``changed`` held.

        Raises:
            SpeculatorError: the thread has found a fault.
        """
        self.changed.wait(min(up_to_s, self.heartbeat_s))
        self.check()

    def check(self) -> None:
        """Raises the thread's fault, if it has found one, or an error if it was stopped."""
        if isinstance(self.fault, SpeculatorError):
            raise SpeculatorError(str(self.fault)) from self.fault
        if self.fault is not None:
            raise SpeculatorError(f"the queue failed: {first_line(self.fault)}") from self.fault
        if self.is_stopping:
            raise SpeculatorError("The queue has been closed.")

    def is_silent(self, heard: float) -> bool:
        """Whether a peer that was heard then is taken for gone."""
        return time.monotonic() - heard > SILENT_BEATS * self.heartbeat_s

    def stop(self) -> None:
        """Closes the sockets. Can be called twice."""
        if self._is_stopped:
            return
        with self.changed:
            self.is_stopping = True
            self.changed.notify_all()
        self.ring()
        if self._thread is not None:
            self._thread.join()
        else:
            self._close_sockets()
        self._is_stopped = True
        os.close(self._bell)
        os.close(self._rope)

    def _run(
        self, turn: Callable[[], None], beat: Callable[[], None], say_goodbye: Callable[[], None]
    ) -> None:
        next_beat = 0.0
        try:
            while not self.is_stopping:
                self.poller.poll(max(0, int(1000 * (next_beat - time.monotonic()) + 1)))
                self._silence_bell()
                with self.changed:
                    turn()
                    if time.monotonic() >= next_beat:
                        beat()
                        next_beat = time.monotonic() + self.heartbeat_s
                    self.changed.notify_all()
            with self.changed:
                say_goodbye()
        except Exception as error:  # whatever it is, those who wait must learn of it
            with self.changed:
                self.fault = error
                self.changed.notify_all()
        finally:
            self._close_sockets()

    def _close_sockets(self) -> None:
        """Does not wait for ever: libzmq 4.3.5 was once seen to, with all sockets closed."""
        end = threading.Thread(target=self._destroy, name="example-queue-end", daemon=True)
        end.start()
        end.join(self.linger_s + CLOSING_S)
        if end.is_alive():
            logger.warning("ZeroMQ did not let go of a socket; went on without")

    def _destroy(self) -> None:
        self.context.destroy(linger=int(1000 * self.linger_s))

    def _silence_bell(self) -> None:
        try:
            os.read(self._bell, 4096)
        except BlockingIOError:
            pass
