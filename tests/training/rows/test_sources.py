"""Rows as they come: without an end, each once a pass, and none lost that was not used."""

import threading
from contextlib import closing
from itertools import islice

import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from speculators_core.data_generation.lengths import Lengths
from speculators_core.data_generation.packing import RowLayout
from speculators_core.data_generation.queues.zmq_store import ZmqStore
from speculators_core.training.rows.sources import Stream
from speculators_core.training.trainer import _only
from tests.data_generation.making import generated, schema
from tests.data_generation.queues.queue_processes import (
    make_sync,
    open_sink,
    open_source,
    wait_until,
)

SCHEMA = schema()
NUM_TOKENS = 5
TIMEOUT_S = 20.0


def make(number, num_tokens=NUM_TOKENS, is_trained=True):
    example = generated(number, num_tokens, SCHEMA)
    example.loss_mask[:] = is_trained
    return example


class Passes:
    """Examples of each pass; an endless row of passes of the last one."""

    is_held = False

    def __init__(self, *passes):
        self.passes = passes
        self.schema = SCHEMA
        self.while_waiting = lambda: None

    def open(self, number):
        self.rest = iter(self.passes[min(number, len(self.passes) - 1)])

    def hold(self):
        yield from self.rest

    def done(self, keys):
        pass


class Queue:
    """The reading end of a real queue."""

    is_held = True

    def __init__(self, source):
        self.source, self.schema = source, SCHEMA
        self.hold, self.done = source.hold, source.done

    def open(self, number):
        assert number == 0


def stream(arrivals, row_tokens=NUM_TOKENS, eval_examples=0, limit=None):
    return Stream(arrivals, RowLayout.of(SCHEMA, None, row_tokens), eval_examples, limit)


def keys(rows, num_rows):
    """Numbers of the examples of each of the next rows."""
    found = [rows.keys_of(int(row["row"])) for row in islice(rows, num_rows)]
    return [[int(key[2:]) for key in row] for row in found]


def test_a_stream_runs_on_into_the_next_pass():
    rows = stream(Passes([make(n) for n in range(7)]), row_tokens=2 * NUM_TOKENS)
    one_pass = [[0, 1], [2, 3], [4, 5], [6]]
    assert keys(rows, 10) == (3 * one_pass)[:10]


def test_no_more_examples_of_a_pass_are_trained_on_than_the_limit():
    rows = stream(Passes([make(n) for n in range(7)]), 2 * NUM_TOKENS, eval_examples=1, limit=3)
    assert keys(rows, 5) == [[1, 2], [3], [1, 2], [3], [1, 2]]


@pytest.mark.parametrize(
    "passes",
    [[[]], [[0]], [[0, 1]], [[0, 1, 2], [1, 0]]],
    ids=["nothing", "held out", "not to learn", "a later pass"],
)
def test_a_pass_without_a_row_is_the_end(passes):
    passes = [[make(n, is_trained=n != 1) for n in numbers] for numbers in passes]
    rows = stream(Passes(*passes), eval_examples=1)
    assert keys(rows, 9) == ([[2]] if len(passes) > 1 else [])
    assert list(rows) == []


def test_the_same_examples_are_held_out_of_every_pass_whatever_its_order():
    examples = [make(n) for n in range(6)]
    rows = stream(Passes(examples, examples[::-1], examples[3:] + examples[:3]), eval_examples=2)
    assert [example.key for example in rows.held_out] == ["0/0", "0/1"]
    assert keys(rows, 12) == [[n] for n in (2, 3, 4, 5, 5, 4, 3, 2, 3, 4, 5, 2)]


def test_a_stream_counts_the_lengths_of_what_it_gave():
    """Without what is held out, and once for each pass."""
    examples = [make(n, 3 + n) for n in range(4)]
    rows = stream(Passes(examples, examples), 100, eval_examples=1)
    assert rows.lengths == Lengths()
    assert keys(rows, 2) == [[1, 2, 3], [1, 2, 3]]
    assert rows.lengths == Lengths.of([4, 5, 6, 4, 5, 6])


def test_a_run_that_goes_on_gets_the_row_after_those_that_it_skips():
    """Also in a later pass, in rows of several examples."""

    def loader():
        examples = [make(n, 3 + n % 4, is_trained=n != 4) for n in range(9)]
        return DataLoader(stream(Passes(examples), 10, 2), batch_size=1, collate_fn=_only)

    whole = list(islice(loader(), 12))
    for num_used in (1, 5, 8):
        rest = list(islice(skip_first_batches(loader(), num_used), 12 - num_used))
        for row, expected in zip(rest, whole[num_used:], strict=True):
            assert row.keys() == expected.keys()
            assert all(torch.equal(row[name], expected[name]) for name in row)


def test_a_queue_sends_again_what_was_not_used():
    """Held out at once, not to learn from, used, and given out when the training was killed."""
    sync = make_sync(queue_size=16)
    source = open_source("zmq", sync, SCHEMA, timeout_s=TIMEOUT_S)
    sink = open_sink(sync, source.url, schema=SCHEMA)
    acknowledged: list[str] = []

    def are_acknowledged(*numbers):
        acknowledged.extend(sink.take_acknowledged())
        return sorted(acknowledged) == [f"0/{n}" for n in numbers]

    try:
        with closing(source):
            sink.write_batch([make(n, is_trained=n != 2) for n in range(5)])
            rows = stream(Queue(source), eval_examples=1)
            assert keys(rows, 2) == [[1], [3]]
            wait_until(lambda: are_acknowledged(0, 2))
            rows.mark_used()
            wait_until(lambda: are_acknowledged(0, 1, 2, 3))
            assert keys(rows, 1) == [[4]]
        with closing(ZmqStore.source(SCHEMA, sync, source.url, timeout_s=TIMEOUT_S)) as source:
            assert keys(stream(Queue(source)), 1) == [[4]]
        assert are_acknowledged(0, 1, 2, 3)
    finally:
        sink.abort()


@pytest.mark.parametrize(
    ("per_row", "expected"), [(2, [[0, 1], [2, 3], [4]]), (9, [[0, 1, 2], [3, 4]])]
)
def test_a_queue_that_is_too_small_gives_up_rows_that_are_out_before_a_full_one(per_row, expected):
    """It holds three examples. A row of more than that goes out as it is."""
    sync = make_sync("mp_queue", queue_size=3)
    with closing(open_source("mp_queue", sync, SCHEMA, timeout_s=TIMEOUT_S)) as source:

        def send():
            sink = open_sink(sync, source.url, schema=SCHEMA)
            sink.write_batch([make(n) for n in range(5)])
            sink.close()

        sender = threading.Thread(target=send)
        sender.start()
        rows = stream(Queue(source), per_row * NUM_TOKENS)
        assert keys(rows, len(expected)) == expected
        rows.mark_used()
        sender.join(timeout=20)
        assert not sender.is_alive()
