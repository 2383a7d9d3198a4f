"""A reader that holds examples: what it has not dealt with is lost by nobody, and stops nobody."""

import os
import random
import signal
import time
from contextlib import ExitStack, closing

import pytest
from torch.utils.data import DataLoader

from speculators_core.data_generation.dataset import GeneratedDataset
from speculators_core.data_generation.packing import RowLayout, rows_held
from speculators_core.data_generation.stores.protocols import HoldingSource
from speculators_core.errors import SpeculatorError
from tests.data_generation.queues.queue_processes import (
    LONG_S,
    SCHEMA,
    consume,
    consume_rows,
    lines_in,
    make_example,
    make_sync,
    open_sink,
    open_source,
    produce,
    start,
    wait_until,
)
from tests.data_generation.queues.test_queues import in_thread, write_all

pytestmark = pytest.mark.parametrize("kind", ["zmq", "mp_queue"])
ROW_LENGTH = 40


def layout():
    return RowLayout.of(SCHEMA, None, ROW_LENGTH)


def rows_apart(count):
    """The rows of so many examples, packed without a queue."""
    return list(layout().rows(make_example(number) for number in range(count)))


def keys_of(examples):
    return [example.key for example in examples]


def acknowledged(sink, count):
    """So many keys, and after a while no more."""
    keys = []

    def have_come():
        keys.extend(sink.take_acknowledged())
        return len(keys) >= count

    wait_until(have_come)
    time.sleep(0.1)
    return keys + sink.take_acknowledged()


def test_a_row_is_acknowledged_when_the_next_one_is_asked_for(kind):
    sync = make_sync(kind, queue_size=20)
    with closing(open_source(kind, sync)) as source:
        assert isinstance(source, HoldingSource)
        sink = open_sink(sync, source.url)
        for number in range(20):
            sink.write(make_example(number))
        rows = iter(GeneratedDataset(source, row_length=ROW_LENGTH))
        expected = [keys_of(row) for row in rows_apart(20)]
        next(rows)
        assert acknowledged(sink, 0) == []
        for keys in expected[:3]:  # of the row that begins, some have come by then
            next(rows)
            assert acknowledged(sink, len(keys)) == keys
        with in_thread(sink.close):
            assert len(list(rows)) == len(expected) - 4


@pytest.mark.parametrize("num_producers", [1, 2])
def test_every_example_comes_once_in_rows_to_the_last_one(kind, num_producers):
    sync = make_sync(kind, queue_size=64)
    with closing(open_source(kind, sync, num_producers=num_producers)) as source:
        shares = [range(first, 100, num_producers) for first in range(num_producers)]
        sinks = [open_sink(sync, source.url) for _ in shares]
        with ExitStack() as writing:
            for sink, share in zip(sinks, shares, strict=True):
                writing.enter_context(in_thread(write_all, sink, share))
            rows = [keys_of(row) for row in rows_held(source, layout().rows)]
        assert sorted(sum(rows, [])) == sorted(f"0/{number}" for number in range(100))
        if num_producers == 1:
            assert rows == [keys_of(row) for row in rows_apart(100)]
        assert sorted(sum((sink.take_acknowledged() for sink in sinks), [])) == sorted(
            sum(rows, [])
        )


def test_a_row_of_more_examples_than_the_queue_holds_goes_out_early(kind, caplog):
    sync = make_sync(kind, queue_size=3)
    ones = [make_example(23 * number) for number in range(20)]  # a token each
    with closing(open_source(kind, sync)) as source:
        sink = open_sink(sync, source.url)

        def write():
            sink.write_batch(ones)
            sink.close()

        with in_thread(write):
            rows = [keys_of(row) for row in rows_held(source, layout().rows)]
    assert sum(rows, []) == keys_of(ones)
    assert {len(row) for row in rows[:-1]} == {3}
    assert caplog.text.count("sync.queue_size 3 is too small") == 1


def test_a_reader_that_has_dealt_with_one_gets_another_however_full_the_queue(kind):
    sync = make_sync(kind, queue_size=2)
    with closing(open_source(kind, sync)) as source:
        with in_thread(write_all, open_sink(sync, source.url), range(60)):
            held = source.hold()
            before = next(held)
            for number in range(1, 60):
                example = next(held)
                assert example.key == f"0/{number}"
                source.done([before.key])
                before = example
            source.done([before.key])
            assert list(held) == []


def test_a_queue_is_shuffled_and_what_waits_in_the_buffer_is_not_acknowledged(kind, caplog):
    sync = make_sync(kind, queue_size=40)
    with closing(open_source(kind, sync)) as source:
        sink = open_sink(sync, source.url)
        with in_thread(write_all, sink, range(100)):
            dataset = GeneratedDataset(source, row_length=ROW_LENGTH, shuffle_buffer=10)
            found, given = [], []
            for row in dataset:
                given += sink.take_acknowledged()
                assert len(given) <= len(found)
                found += ids_of(row)
        in_order = [make_example(number).input_ids.tolist() for number in range(100)]
        assert sorted(found) == sorted(in_order) and found != in_order
        assert "too small" not in caplog.text
        with pytest.raises(SpeculatorError, match="shuffle_buffer 40: the queue holds 40 examples"):
            GeneratedDataset(source, shuffle_buffer=40)


def ids_of(row):
    """Of each document."""
    documents = row.document_ids[0]
    return [row.input_ids[0, documents == n].tolist() for n in range(int(documents.max()) + 1)]


def test_single_examples_of_a_queue_are_shuffled_too(kind):
    sync = make_sync(kind, queue_size=8)
    with closing(open_source(kind, sync)) as source:
        sink = open_sink(sync, source.url)
        with in_thread(write_all, sink, range(30)):
            found = keys_of(GeneratedDataset(source, shuffle_buffer=5).examples())
        in_order = [f"0/{number}" for number in range(30)]
        assert sorted(found) == sorted(in_order) and found != in_order


def test_what_a_reader_leaves_is_given_again_in_order(kind):
    sync = make_sync(kind, queue_size=20)
    with closing(open_source(kind, sync)) as source:
        sink = open_sink(sync, source.url)
        for number in range(20):
            sink.write(make_example(number))
        held = source.hold()
        assert [next(held).key for _ in range(5)] == [f"0/{number}" for number in range(5)]
        source.done(["0/1", "0/3", "unknown"])
        rest = [f"0/{number}" for number in range(20) if number not in (1, 3)]
        with in_thread(sink.close):
            again = keys_of(source.hold())
            assert again == rest  # it ends, though none of them has been dealt with
            assert keys_of(source.read()) == rest
            assert list(source.hold()) == []


def test_examples_of_a_lost_producer_go_out(kind):
    """What would fill their row may never come."""
    sync = make_sync(kind, queue_size=20, heartbeat_s=0.1)
    with closing(open_source(kind, sync, timeout_s=1.0)) as source:
        sink = open_sink(sync, source.url, name="unlucky")
        sink.write_batch([make_example(0), make_example(1)])
        held = source.hold()
        assert [next(held).key, next(held).key] == ["0/0", "0/1"]
        sink._sender._io.stop()  # as if killed
        sink._clean_up()
        assert list(held) == []
        source.done(["0/0", "0/1"])
        with in_thread(write_all, open_sink(sync, source.url), range(4)):  # it is started again
            assert keys_of(source.read()) == ["0/2", "0/3"]


def test_a_producer_that_repeats_what_is_held_does_not_block(kind):
    """Its journal knows of no example of a row that has not been dealt with."""
    sync = make_sync(kind, queue_size=3, heartbeat_s=0.1)
    with closing(open_source(kind, sync)) as source:
        first = open_sink(sync, source.url)
        for number in range(3):
            first.write(make_example(number))
        rows = rows_held(source, layout().rows)
        held = next(rows)
        assert keys_of(held) == ["0/0", "0/1", "0/2"]
        first._sender._io.stop()  # as if killed
        first._clean_up()
        with in_thread(write_all, open_sink(sync, source.url), range(9)):
            assert sum((keys_of(row) for row in rows), []) == [f"0/{n}" for n in range(3, 9)]


def test_rows_that_a_killed_consumer_had_not_dealt_with_go_to_the_other(kind, tmp_path):
    sync, logs = make_sync(kind, queue_size=30), [tmp_path / "killed", tmp_path / "other"]
    killed = start(consume_rows, sync, logs[0], ROW_LENGTH)
    other = start(consume, sync, "tcp://127.0.0.1:*", {}, logs[1], 0.01)
    wait_until(lambda: all(map(lines_in, logs)))
    there = sync.model_copy(update={"urls": tuple(lines_in(log)[0] for log in logs)})
    start(produce, there, "p", range(100), tmp_path / "p")
    wait_until(lambda: len(lines_in(logs[0])) == 3)
    os.kill(killed.pid, signal.SIGKILL)
    other.join(LONG_S)
    first, second = (line.split() for line in lines_in(logs[0])[1:])
    found = [line.split()[0] for line in lines_in(logs[1])[1:]]
    assert len(set(found)) == len(found) and set(second) <= set(found)
    assert sorted(found + first) == sorted(f"0/{number}" for number in range(100))


def test_any_order_of_dealing_with_examples_ends(kind):
    """A reader that holds some, deals with any of them, begins anew: each comes once in the end."""
    draw = random.Random(3)
    sync = make_sync(kind, queue_size=6)
    with closing(open_source(kind, sync)) as source:
        sink = open_sink(sync, source.url)
        with in_thread(write_all, sink, range(80)):
            dealt, is_over = [], False
            while not is_over:
                is_over, held = True, []
                for example in source.hold():
                    is_over = False
                    held.append(example.key)
                    if draw.random() < 0.4:
                        dealt.append(held.pop(draw.randrange(len(held))))
                        source.done(dealt[-1:])
                    if draw.random() < 0.05:
                        break
            assert sorted(dealt) == sorted(f"0/{number}" for number in range(80))


def test_workers_of_a_loader_do_not_hold_examples_of_a_queue(kind):
    with closing(open_source(kind, make_sync(kind))) as source:
        with pytest.raises(SpeculatorError, match="num_workers=0"):
            list(DataLoader(GeneratedDataset(source), batch_size=None, num_workers=1))
