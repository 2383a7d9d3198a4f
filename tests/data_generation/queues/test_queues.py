"""What both queues keep: order, bounds, every example once, whoever dies."""

import logging
import os
import re
import signal
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from speculators_core.data_generation.examples import Schema
from speculators_core.data_generation.stores.protocols import DataSink, DataSource
from speculators_core.errors import SpeculatorError
from tests.data_generation.queues.queue_processes import (
    LONG_S,
    SCHEMA,
    consume,
    digest,
    expected_lines,
    leftovers,
    line_of,
    lines_in,
    make_example,
    make_sync,
    open_sink,
    open_source,
    produce,
    start,
    wait_until,
)

KINDS = ["zmq", "mp_queue"]
pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = leftovers()
    yield
    wait_until(lambda: leftovers() <= before)


@contextmanager
def in_thread(function, *arguments):
    """Its error, if any, is raised here."""
    errors = []

    def run():
        try:
            function(*arguments)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield thread
    thread.join(LONG_S)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def write_all(sink, numbers):
    for number in numbers:
        sink.write(make_example(number))
    sink.close()


def test_examples_arrive_in_order_and_end(kind):
    sync = make_sync(kind)
    with closing(open_source(kind, sync)) as source:
        sink = open_sink(sync, source.url)
        assert isinstance(sink, DataSink) and isinstance(source, DataSource)
        with in_thread(write_all, sink, range(60)):
            found = [line_of(example) for example in source.read()]
        assert found == [line_of(make_example(number)) for number in range(60)]
        assert sink.take_acknowledged() == [f"0/{number}" for number in range(60)]
        assert sink.take_acknowledged() == []
        assert list(source.read()) == []


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float32", "logits": "top-k", "top_k": 5}, {"dtype": "float8_e4m3fn"}],
    ids=str,
)
def test_examples_of_other_types_arrive_as_they_are_stored(kind, changes):
    schema = Schema.model_validate({**SCHEMA.model_dump(), **changes})
    sync = make_sync(kind)
    example = make_example(9, schema)
    tensors = schema.encode(example)
    stored = schema.decode(example.key, example.num_prompt_tokens, tensors, "here")
    with closing(open_source(kind, sync, schema)) as source:
        sink = open_sink(sync, source.url, schema=schema)
        sink.write(example)
        with in_thread(sink.close):
            (found,) = source.read()
        assert digest(found) == digest(stored)


def test_a_producer_waits_for_a_slow_reader_and_nothing_grows(kind):
    sync = make_sync(kind, queue_size=3, heartbeat_s=0.1)
    written = []

    def write(sink):
        for number in range(30):
            sink.write(make_example(number))
            written.append(number)
        sink.close()

    silence_s = 1.0  # ten heartbeats, of which some are late on a machine with other work
    with closing(open_source(kind, sync, timeout_s=silence_s)) as source:
        with in_thread(write, open_sink(sync, source.url, timeout_s=silence_s)):
            reader = source.read()
            for number in range(30):  # as many have been dealt with when it is given
                assert next(reader).key == f"0/{number}"
                if number in (0, 10):  # longer than any silence that is taken for death
                    time.sleep(1.3 * silence_s)
                    assert len(written) == number + 3
                assert len(written) <= number + 3
            assert list(reader) == []


def test_memory_stays_flat_over_a_long_run(kind, tmp_path):
    sync = make_sync(kind, queue_size=2)
    peaks = []
    for num_examples in (40, 400):
        file = tmp_path / f"{num_examples}"
        with closing(open_source(kind, sync)) as source:
            there = sync.model_copy(update={"urls": (source.url,)})
            start(produce_large, there, num_examples, file)
            assert sum(1 for _ in source.read()) == num_examples
        wait_until(lambda file=file: file.exists() and file.read_text())
        num_acknowledged, peak_kb = map(int, file.read_text().split())
        assert num_acknowledged == num_examples
        peaks.append(1024 * peak_kb)
    assert peaks[1] - peaks[0] < 30e6 < 400 * LARGE_TOKENS * SCHEMA.token_bytes


LARGE_TOKENS = 8000


def produce_large(sync, num_examples, file):
    import tests.data_generation.queues.queue_processes as processes

    made = processes.make_example(1, num_tokens=LARGE_TOKENS)
    processes.make_example = lambda number: processes.GeneratedExample(
        **{**vars(made), "key": f"0/{number}"}
    )
    produce(sync, "large", range(num_examples), file)


def test_two_producers_and_two_consumers_pass_each_example_once(kind, tmp_path):
    logs = [tmp_path / "consumer-0", tmp_path / "consumer-1"]
    sync = make_sync(kind)
    for log in logs:
        start(consume, sync, "tcp://127.0.0.1:*", {"num_producers": 2}, log)
    wait_until(lambda: all(map(lines_in, logs)))
    there = sync.model_copy(update={"urls": tuple(lines_in(log)[0] for log in logs)})
    makers = [
        start(produce, there, f"p{i}", range(100 * i, 100 * i + 100), tmp_path / f"p{i}")
        for i in range(2)
    ]
    for process in makers:
        process.join(LONG_S)
    wait_until(lambda: sum(len(lines_in(log)) - 1 for log in logs) == 200)
    found = [lines_in(log)[1:] for log in logs]
    assert sorted(sum(found, [])) == expected_lines(range(200))
    assert all(len(lines) > 20 for lines in found)


def test_what_a_killed_consumer_had_goes_to_the_other(kind, tmp_path):
    logs = [tmp_path / "killed", tmp_path / "other"]
    sync = make_sync(kind)
    consumers = [start(consume, sync, "tcp://127.0.0.1:*", {}, log, 0.01) for log in logs]
    wait_until(lambda: all(map(lines_in, logs)))
    there = sync.model_copy(update={"urls": tuple(lines_in(log)[0] for log in logs)})
    start(produce, there, "p", range(100), tmp_path / "p")
    wait_until(lambda: len(lines_in(logs[0])) > 10)
    os.kill(consumers[0].pid, signal.SIGKILL)
    consumers[1].join(LONG_S)
    killed, other = (lines_in(log)[1:] for log in logs)
    assert sorted({*killed, *other}) == expected_lines(range(100))
    assert len(set(other)) == len(other)
    assert len({*killed} & {*other}) <= 1  # in its hands when it was killed
    assert (tmp_path / "p").read_text().startswith("100 ") or len(killed) < 100


@pytest.mark.parametrize("name", ["p", "another"])
def test_a_killed_producer_is_replaced_and_nothing_comes_twice(kind, name, tmp_path):
    sync = make_sync(kind)
    with closing(open_source(kind, sync)) as source:
        there = sync.model_copy(update={"urls": (source.url,)})
        first = start(produce, there, "p", range(100), tmp_path / "first", 0.005)
        reader, found = source.read(), []
        for _ in range(20):
            found.append(line_of(next(reader)))
        os.kill(first.pid, signal.SIGKILL)
        start(produce, there, name, range(10, 100), tmp_path / "second")
        found += [line_of(example) for example in reader]
        assert sorted(found) == expected_lines(range(100))
        wait_until(lambda: lines_in(tmp_path / "second"))
        assert lines_in(tmp_path / "second")[0].startswith("90 ")


def test_leaving_the_loop_acknowledges_nothing(kind):
    sync = make_sync(kind)
    with closing(open_source(kind, sync)) as source:
        sink = open_sink(sync, source.url)
        for number in range(3):
            sink.write(make_example(number))
        for example in source.read():
            assert example.key == "0/0"
            break
        time.sleep(0.1)
        assert sink.take_acknowledged() == []
        reader = source.read()
        assert [next(reader).key, next(reader).key] == ["0/0", "0/1"]
        wait_until(lambda: sink.take_acknowledged() == ["0/0"])
        with in_thread(sink.close):
            assert [example.key for example in reader] == ["0/2"]


def test_an_example_of_two_producers_arrives_once_and_both_are_told(kind):
    sync = make_sync(kind, queue_size=8)
    with closing(open_source(kind, sync, num_producers=2)) as source:
        sinks = [open_sink(sync, source.url) for _ in range(2)]
        for sink in sinks:
            for number in (1, 2):
                sink.write(make_example(number))
        with in_thread(sinks[0].close), in_thread(sinks[1].write, make_example(3)):
            reader = source.read()
            assert [next(reader).key for _ in range(3)] == ["0/1", "0/2", "0/3"]
            with in_thread(write_all, sinks[1], [1, 4]):  # 1 was dealt with long ago
                assert [example.key for example in reader] == ["0/4"]
        keys = [sink.take_acknowledged() for sink in sinks]
        assert [sorted(found) for found in keys] == [
            ["0/1", "0/2"],
            ["0/1", "0/1", "0/2", "0/3", "0/4"],
        ]


def test_what_a_closed_consumer_had_goes_to_the_other(kind):
    sync = make_sync(kind)
    first, second = open_source(kind, sync), open_source(kind, sync)
    with closing(second):
        sink = open_sink(sync, first.url, second.url)
        with in_thread(write_all, sink, range(30)):
            reader = first.read()
            found = [next(reader).key for _ in range(5)]
            reader.close()
            first.close()
            found += [example.key for example in second.read()]
        assert sorted(set(found)) == sorted(f"0/{number}" for number in range(30))
        assert len(found) == 31  # the fifth was not acknowledged


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 16}, {"verifier": "huge"}, {"dtype": "float16"}, {"top_k": 3}]
)
def test_a_producer_of_another_schema_is_refused_by_name(kind, changes):
    sync = make_sync(kind)
    theirs = Schema.model_validate({**SCHEMA.model_dump(), **changes})
    ((name, value),) = changes.items()
    with closing(open_source(kind, sync)) as source:
        sink = open_sink(sync, source.url, schema=theirs, name="stranger")
        expected = f"producer stranger: its {name} is {value!r}, expected {getattr(SCHEMA, name)!r}"
        with pytest.raises(SpeculatorError, match=re.escape(expected)):
            sink.write(make_example(1, theirs))
        with pytest.raises(SpeculatorError, match=re.escape(expected)):
            sink.close()
        sink = open_sink(sync, source.url)
        with in_thread(write_all, sink, [1]):
            assert [example.key for example in source.read()] == ["0/1"]


@pytest.mark.parametrize(
    ("num_tokens", "changes", "message"),
    [
        (
            2000,
            {},
            "2000 tokens take 114000 bytes, expected at most sync.max_message_bytes",
        ),
        (8, {"key": ""}, "key: String should have at least 1 character"),
        (8, {"key": "\ud800"}, "key: Input should be a valid string, unable to parse"),
        (8, {"num_prompt_tokens": 99}, "num_prompt_tokens 99 exceeds num_tokens 8"),
    ],
    ids=["size", "key", "text", "prompt"],
)
def test_an_example_that_cannot_be_sent_is_refused_alone(kind, num_tokens, changes, message):
    sync = make_sync(kind, max_message_bytes=100_000)
    with closing(open_source(kind, sync)) as source:
        sink = open_sink(sync, source.url)
        with pytest.raises(SpeculatorError, match=message):
            sink.write(replace(make_example(7, num_tokens=num_tokens), **changes))
        with in_thread(write_all, sink, [1]):
            assert [example.key for example in source.read()] == ["0/1"]


def test_a_reader_says_who_is_missing(kind):
    sync = make_sync(kind, heartbeat_s=0.1)
    with closing(open_source(kind, sync, num_producers=3, timeout_s=1.0)) as source:
        with pytest.raises(SpeculatorError, match=r"3 of 3 producers .* 1 s \(never seen\)"):
            next(source.read())
        done = open_sink(sync, source.url)
        with in_thread(write_all, done, [1]):
            reader = source.read()
            assert next(reader).key == "0/1"
            lost = open_sink(sync, source.url, name="unlucky")
            lost.write(make_example(2))
            assert next(reader).key == "0/2"
        lost._sender._io.stop()  # as if killed
        lost._clean_up()
        with pytest.raises(SpeculatorError, match=r"2 of 3 producers .* \(lost: unlucky\)"):
            next(reader)


def test_a_producer_says_that_nobody_listens(kind):
    sync = make_sync(kind, heartbeat_s=0.1)
    source = open_source(kind, sync)
    if kind == "mp_queue":
        url = source.url.replace("socket", "nobody")
    else:
        url = source.url
        source.close()
    sink = open_sink(sync, url, timeout_s=0.4)
    expected = f"No consumer took examples for 0.4 s ({url}: no answer)"
    with pytest.raises(SpeculatorError, match=re.escape(expected)):
        sink.write(make_example(1))
    source.close()
    sink.close()


def test_a_producer_too_many_waits_for_a_place(kind):
    sync = make_sync(kind, heartbeat_s=0.1)
    with closing(open_source(kind, sync)) as source:
        first = open_sink(sync, source.url, name="first")
        first.write(make_example(1))
        for name, reason in [
            ("first", "'first' is already connected"),
            ("more", "all 1 expected"),
        ]:
            late = open_sink(sync, source.url, name=name, timeout_s=0.3)
            with pytest.raises(SpeculatorError, match=reason):
                late.write(make_example(2))
            late._sender._io.stop()
            late._clean_up()
        with in_thread(first.close):
            assert [example.key for example in source.read()] == ["0/1"]


def test_consumers_that_never_came_are_waited_for_and_named(kind, caplog):
    sync = make_sync(kind, heartbeat_s=0.1)
    with closing(open_source(kind, sync)) as source:
        nobody = (
            source.url.replace("socket", "nobody") if kind == "mp_queue" else "tcp://127.0.0.1:9"
        )
        sink = open_sink(sync, source.url, nobody, timeout_s=0.4)
        with caplog.at_level(logging.WARNING), in_thread(write_all, sink, [1]):
            assert [example.key for example in source.read()] == ["0/1"]
        assert f"{nobody} did not acknowledge the end" in caplog.text


def test_a_closed_end_says_so(kind):
    sync = make_sync(kind)
    source = open_source(kind, sync)
    sink = open_sink(sync, source.url)
    with in_thread(sink.close):
        assert list(source.read()) == []
    sink.close()
    source.close()
    source.close()
    for use in (lambda: sink.write(make_example(1)), lambda: next(source.read())):
        with pytest.raises(SpeculatorError, match="queue is closed"):
            use()
