import threading
import time

import pytest

from speculators_vllm.hidden_states.outbox import Failure, Outbox, PendingStates, wait_for_room
from speculators_vllm.hidden_states.stream import StreamWriter
from tests.vllm.hidden_states.records import record


class Sink:
    """A writer that waits for its gate, and fails as often as it is asked to."""

    def __init__(self, *faults):
        self.gate = threading.Event()
        self.gate.set()
        self.faults = list(faults)
        self.calls = []

    def write(self, states):
        self.gate.wait()
        self._note("write", states.name)

    def report(self, request_id, name, reason):
        self._note("report", name, reason)

    def _note(self, *call):
        self.calls.append(call)
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault

    def stop(self):
        self.gate.set()

    def close(self):
        self.calls.append(("close",))


def pending(name, wait=lambda: None):
    return PendingStates(record(name=name), wait)


@pytest.fixture
def outbox_of():
    opened = []

    def make(sink, capacity_bytes=10**6):
        opened.append(Outbox(sink, capacity_bytes))
        return opened[-1]

    yield make
    for outbox in opened:
        outbox.close(5)


def ended_of(outbox, number, within_s=5):
    ended, deadline = {}, time.monotonic() + within_s
    while len(ended) < number and time.monotonic() < deadline:
        ended |= outbox.take_ended()
    return ended


def test_an_outbox_that_nobody_empties_closes_in_time_and_says_what_was_lost():
    outbox = Outbox(StreamWriter("ipc:///nobody/is/here"), capacity_bytes=1000)
    states = record(num_tokens=10)
    assert outbox.has_room(10**9)  # alone, whatever its size
    outbox.put(PendingStates(states, lambda: None))
    assert outbox.in_flight_bytes == states.size_bytes
    assert outbox.has_room(1000 - states.size_bytes)
    assert not outbox.has_room(1001 - states.size_bytes)
    started = time.monotonic()
    outbox.close(0.1)
    assert time.monotonic() - started < 2
    assert outbox.in_flight_bytes == 0
    assert "shut down before" in outbox.take_ended()["id-a"]


def test_states_leave_in_order_and_each_failure_concerns_its_request_alone(outbox_of):
    def no_memory():
        raise RuntimeError("no memory\non the device")

    sink = Sink(None, OSError("disk is full"), None, None)
    outbox = outbox_of(sink)
    for item in (
        pending("a"),
        pending("b"),
        Failure("id-c", "c", "no copy"),
        pending("d", no_memory),
        pending("e"),
    ):
        outbox.put(item)
    assert ended_of(outbox, 5) == {
        "id-a": None,
        "id-b": "disk is full",
        "id-c": "no copy",
        "id-d": "no memory",
        "id-e": None,
    }
    assert sink.calls == [
        ("write", "a"),
        ("write", "b"),
        ("report", "b", "disk is full"),
        ("report", "c", "no copy"),
        ("report", "d", "no memory"),
        ("write", "e"),
    ]
    assert outbox.in_flight_bytes == 0 and outbox.take_ended() == {}


def test_a_report_that_fails_is_part_of_the_reason(outbox_of):
    outbox = outbox_of(Sink(OSError("disk is full"), OSError("still full")))
    outbox.put(pending("a"))
    assert ended_of(outbox, 1) == {"id-a": "disk is full; the report failed too: still full"}


def test_room_comes_back_when_states_have_left(outbox_of):
    size_bytes = record().size_bytes
    sink = Sink()
    outbox = outbox_of(sink, capacity_bytes=2 * size_bytes)
    sink.gate.clear()
    for name in "ab":
        assert outbox.has_room(size_bytes)
        outbox.put(pending(name))
    assert not outbox.has_room(1)
    assert not wait_for_room(outbox, 1, time.monotonic() + 0.1)
    threading.Timer(0.1, sink.gate.set).start()
    assert wait_for_room(outbox, 2 * size_bytes, time.monotonic() + 5)


def test_a_writer_is_closed_by_the_thread_that_used_it():
    sink = Sink()
    outbox = Outbox(sink, 10**6)
    outbox.put(pending("a"))
    outbox.close(5)
    assert sink.calls == [("write", "a"), ("close",)]
    assert outbox.take_ended() == {"id-a": None}
