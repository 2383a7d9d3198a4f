"""What only the network brings: strangers, garbage, keys, consumers that come back."""

import os
import random
import re
import signal
import socket
import threading
import time
import zlib
from contextlib import closing

import pytest
import torch
import zmq
import zmq.auth

from speculators_core.data_generation.queues import receiver, zmq_store
from speculators_core.data_generation.queues.frames import (
    HEADER,
    MAX_BODY_BYTES,
    Hello,
    Kind,
    Label,
    Message,
    SharedFile,
    Welcome,
    checksum,
    pack,
    pack_tensors,
    unpack,
)
from speculators_core.data_generation.queues.zmq_store import ZmqStore
from speculators_core.errors import SpeculatorError
from tests.data_generation.queues.queue_processes import (
    LONG_S,
    SCHEMA,
    consume,
    expected_lines,
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
from tests.data_generation.queues.test_queues import in_thread, write_all

NUM_MUTATIONS = 250
MAX_MESSAGE_BYTES = 100_000


class Stranger:
    """Talks to a source by hand."""

    def __init__(self, url, name="stranger", store="zmq"):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.connect(url)
        self.hello = Message(Kind.HELLO, body=Hello(name=name, store=store, holds=SCHEMA))
        self.session = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.destroy(linger=0)

    def send(self, frames):
        self.socket.send_multipart(frames)

    def answer(self, timeout_s=5.0):
        """None where there is none."""
        while self.socket.poll(int(1000 * timeout_s)):
            message = unpack([memoryview(part) for part in self.socket.recv_multipart()], 0)
            if message.kind != Kind.BEAT:
                return message
        return None

    def enter(self):
        """Says hello until it is let in."""
        for _ in range(200):
            self.send(pack(self.hello))
            answer = self.answer()
            if answer.kind == Kind.WELCOME:
                assert isinstance(answer.body, Welcome)
                self.session = answer.session
                return
            time.sleep(0.02)
        raise AssertionError(answer)

    def example(self, number=0, key="attack", session=None, **changes):
        """A valid message, as far as ``changes`` of its label allow."""
        payload = pack_tensors(SCHEMA.encode(make_example(5)))
        label = Label(
            key=key, num_tokens=6, num_prompt_tokens=1, checksum=checksum(payload)
        ).model_copy(update=changes)
        session = self.session if session is None else session
        return pack(Message(Kind.EXAMPLE, session, number, label, payload))

    def say(self, kind, number=0):
        return pack(Message(kind, self.session, number))


def sealed(header, body):
    """Header fields with the checksum that they should have."""
    blank = HEADER.pack(*header[:-1], 0)
    return HEADER.pack(*header[:-1], zlib.crc32(body, zlib.crc32(blank)))


def mutated(frames, rng):
    """A message that is no longer the same."""
    frames = [bytes(frame) for frame in frames]
    where = rng.randrange(len(frames))
    while not frames[where]:
        where = rng.randrange(len(frames))
    part = bytearray(frames[where])
    position = rng.randrange(len(part))
    header = list(HEADER.unpack(frames[0]))
    match rng.randrange(11):
        case 0:
            part[position] ^= 1 << rng.randrange(8)
        case 1:
            del part[position:]
        case 2:
            part += rng.randbytes(rng.randint(1, 50))
        case 3:
            part = bytearray(rng.randbytes(len(part)))
        case 4:
            return frames[:where] + frames[where + 1 :]
        case 5:
            return frames[: where + 1] + frames[where:]
        case 6:
            return frames + [b"x"] * rng.randint(1, 500)
        case 7:
            header[rng.choice([1, 2, 3, 4, 5, 6])] ^= 1 << rng.randrange(8)
            return [sealed(header, frames[1]), *frames[1:]]
        case 8:  # of the body, with the length and the checksum it should have
            body = bytearray(frames[1] or b"{}")
            body[rng.randrange(len(body))] ^= 128
            header[6] = len(body)
            return [sealed(header, bytes(body)), bytes(body), *frames[2:]]
        case 9:
            return [rng.randbytes(rng.randint(0, 100)) for _ in range(rng.randint(1, 6))]
        case _:
            return frames[:1] + [b"[" * (MAX_BODY_BYTES + rng.randrange(2))] + frames[2:]
    return frames[:where] + [bytes(part)] + frames[where + 1 :]


def attack(url, seed):
    """Whether the source said no, to something that is not quite what a producer says."""
    rng = random.Random(seed)
    with Stranger(url, f"attacker-{seed}") as stranger:
        which = rng.randrange(6)
        if which == 0:
            stranger.send(mutated(pack(stranger.hello), rng))
        else:
            stranger.enter()
            valid = [
                stranger.example(),
                stranger.example(),
                stranger.say(Kind.END),
                stranger.say(Kind.BEAT),
                stranger.example(),
            ][which - 1]
            stranger.send(mutated(valid, rng))
        answer = stranger.answer()
        return answer is not None and answer.kind == Kind.REFUSED


def test_hundreds_of_mutations_harm_nobody_else():
    sync = make_sync(max_message_bytes=MAX_MESSAGE_BYTES, heartbeat_s=1.0)
    with closing(open_source("zmq", sync, num_producers=2)) as source:
        sink = open_sink(sync, source.url)
        seen, verdicts, is_over = [], [], threading.Event()

        def go_on():
            number = 0
            while not is_over.is_set() or number < 300:
                sink.write(make_example(number))
                number += 1
                time.sleep(0.002)
            sink.close()
            seen.append(number)

        def attack_all():
            try:
                verdicts.extend(attack(source.url, seed) for seed in range(NUM_MUTATIONS))
            finally:
                is_over.set()
            write_all(open_sink(sync, source.url), [])

        with in_thread(go_on), in_thread(attack_all):
            found = [line_of(example) for example in source.read()]
        assert sorted(found) == expected_lines(range(seen[0]))
        assert len(found) >= 300
        assert verdicts == [True] * NUM_MUTATIONS
        assert source.num_refused >= NUM_MUTATIONS


MISBEHAVIOUR = {
    "another session": lambda s: [s.example(session=s.session ^ 1)],
    "a number too far": lambda s: [s.example(1)],
    "the same again": lambda s: [s.example(), s.example()],
    "more than there is room for": lambda s: [s.example(i, f"attack {i}") for i in range(5)],
    "the end with examples held": lambda s: [s.example(), s.say(Kind.END, 1)],
    "a second hello": lambda s: [pack(s.hello)],
    "a consumer's word": lambda s: [s.say(Kind.ACK)],
    "a file": lambda s: [s.example(file=SharedFile(path="/etc/passwd", ticket=1))],
    "more tokens than bytes": lambda s: [s.example(num_tokens=7)],
    "another checksum": lambda s: [s.example(checksum=1)],
    "wrongly compressed": lambda s: [s.example(compression="zstd")],
    "too large by one token": lambda s: [s.example(num_tokens=MAX_MESSAGE_BYTES // 57 + 1)],
}


@pytest.mark.parametrize("misbehave", MISBEHAVIOUR.values(), ids=list(MISBEHAVIOUR))
def test_who_does_not_keep_to_the_protocol_is_shown_out(misbehave, caplog):
    sync = make_sync(max_message_bytes=MAX_MESSAGE_BYTES)
    with closing(open_source("zmq", sync)) as source, Stranger(source.url) as stranger:
        stranger.enter()
        for frames in misbehave(stranger):
            stranger.send(frames)
        assert stranger.answer().kind == Kind.REFUSED
        assert source.num_refused >= 1
        assert caplog.text.count("refused a message from stranger") <= 1
        stranger.send(stranger.example())
        assert stranger.answer().kind in (Kind.WAIT, Kind.REFUSED)
        sink = open_sink(sync, source.url)  # its place is free
        with in_thread(write_all, sink, range(3)):
            found = [example.key for example in source.read()]
        assert found == ["0/0", "0/1", "0/2"]


@pytest.mark.parametrize(
    "more", [lambda s: s.example(1), lambda s: s.say(Kind.CLOSING)], ids=["example", "closing"]
)
def test_after_the_end_there_is_nothing(more):
    with closing(open_source("zmq", make_sync())) as source, Stranger(source.url) as stranger:
        stranger.enter()
        stranger.send(stranger.say(Kind.END))
        assert stranger.answer().kind == Kind.ACK
        stranger.send(more(stranger))
        assert stranger.answer().kind == Kind.REFUSED
        assert list(source.read()) == []


def test_what_was_recorded_is_of_no_use_later():
    sync = make_sync()
    with closing(open_source("zmq", sync)) as source:
        with Stranger(source.url) as honest:
            honest.enter()
            record = [pack(honest.hello), honest.example(), honest.say(Kind.END, 1)]
        wait_until(lambda: not source._receiver._producers)
        with Stranger(source.url) as replayed:
            for frames in record:
                replayed.send(frames)
            assert [replayed.answer().kind for _ in range(2)] == [Kind.WELCOME, Kind.REFUSED]
        sink = open_sink(sync, source.url)
        with in_thread(write_all, sink, [1]):
            assert [example.key for example in source.read()] == ["0/1"]


def test_a_stranger_cannot_take_the_place_of_one_who_is_there():
    sync = make_sync()
    with closing(open_source("zmq", sync, num_producers=2)) as source:
        sink = open_sink(sync, source.url, name="p")
        sink.write(make_example(1))
        with Stranger(source.url, "p") as stranger:
            stranger.send(pack(stranger.hello))
            assert stranger.answer().kind == Kind.WAIT
            stranger.send(stranger.say(Kind.END))
            assert stranger.answer().kind == Kind.WAIT
        with (
            in_thread(write_all, sink, [2]),
            in_thread(write_all, open_sink(sync, source.url), [3]),
        ):
            assert sorted(example.key for example in source.read()) == ["0/1", "0/2", "0/3"]


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


def long_frame(size_bytes):
    return b"\x02" + size_bytes.to_bytes(8, "big")


HANDSHAKE = GREETING + b"\x04" + bytes([len(READY)]) + READY


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", False),
        (bytes(64), False),
        (random.Random(1).randbytes(5000), False),
        (GREETING[:30], False),
        (GREETING + b"\x04\xff" + READY, False),
        (HANDSHAKE + long_frame(9000) + b"half", False),
        (HANDSHAKE + long_frame(MAX_MESSAGE_BYTES + 1), True),
        (HANDSHAKE + long_frame(2**62) + b"x" * 99, True),
    ],
    ids="http zeros noise half-greeting half-ready half large huge".split(),
)
def test_what_is_not_even_zeromq_harms_nobody(said, ends):
    sync = make_sync(max_message_bytes=MAX_MESSAGE_BYTES)
    with closing(open_source("zmq", sync)) as source:
        sink = open_sink(sync, source.url)
        host, port = source.url.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as peer:
            peer.sendall(said)
            with in_thread(write_all, sink, range(5)):
                found = [line_of(example) for example in source.read()]
            if ends:
                wait_until(lambda: hung_up(peer))
        assert found == [line_of(make_example(number)) for number in range(5)]


def hung_up(peer):
    try:
        return peer.recv(65536) == b""
    except ConnectionError:
        return True


def test_one_log_line_a_peer_says_that_it_was_refused(caplog):
    with closing(open_source("zmq", make_sync())) as source, Stranger(source.url) as stranger:
        for _ in range(20):
            stranger.send([b"garbage", b""])
        wait_until(lambda: source.num_refused == 20)
        assert caplog.text.count("refused a message from") == 1


def test_keys_that_were_dealt_with_are_forgotten_in_the_end(monkeypatch):
    monkeypatch.setattr(receiver, "REMEMBERED", 10)
    sync = make_sync()
    with closing(open_source("zmq", sync)) as source:
        with in_thread(write_all, open_sink(sync, source.url), [*range(30), 25, 2]):
            found = [example.key for example in source.read()]
        assert found == [f"0/{number}" for number in [*range(30), 2]]
        assert len(source._receiver._dealt) == 10


def test_a_producer_of_the_other_store_is_refused():
    with closing(open_source("zmq", make_sync())) as source:
        with Stranger(source.url, store="mp_queue") as stranger:
            stranger.send(pack(stranger.hello))
            answer = stranger.answer()
    assert answer.kind == Kind.REFUSED
    assert answer.body.reason == "its store is mp_queue, expected zmq"


def test_a_producer_of_another_version_learns_why():
    with closing(open_source("zmq", make_sync())) as source, Stranger(source.url) as stranger:
        header, body = pack(stranger.hello)
        fields = list(HEADER.unpack(header))
        fields[1] = 2
        stranger.send([sealed(fields, body), body])
        assert stranger.answer().body.reason == "protocol version 2, expected 1"


def test_a_producer_that_may_send_more_than_a_consumer_takes_says_so():
    with closing(open_source("zmq", make_sync(max_message_bytes=1000))) as source:
        sink = open_sink(make_sync(max_message_bytes=1001), source.url)
        expected = "accepts messages of 1000 bytes, expected 1001 .* sync.max_message_bytes"
        with pytest.raises(SpeculatorError, match=expected):
            sink.write(make_example(1))


def test_a_producer_does_not_take_any_server_for_a_consumer():
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    sink = open_sink(make_sync(), f"tcp://127.0.0.1:{port}")
    peer, *_ = router.recv_multipart()
    router.send_multipart([peer, b"what?"])
    with pytest.raises(SpeculatorError, match="is not a consumer of this protocol: not a message"):
        sink.write(make_example(1))
    context.destroy(linger=0)


def test_a_consumer_that_was_killed_goes_on_at_the_same_place(tmp_path):
    sync, log = make_sync(), tmp_path / "first"
    first = start(consume, sync, "tcp://127.0.0.1:*", {}, log, 0.01)
    wait_until(lambda: lines_in(log))
    url = lines_in(log)[0]
    there = sync.model_copy(update={"urls": (url,)})
    start(produce, there, "p", range(60), tmp_path / "p")
    wait_until(lambda: len(lines_in(log)) > 10)
    os.kill(first.pid, signal.SIGKILL)
    first.join(LONG_S)
    with closing(ZmqStore.source(SCHEMA, sync, url)) as source:
        found = [line_of(example) for example in source.read()]
    before = lines_in(log)[1:]
    assert sorted({*found, *before}) == expected_lines(range(60))
    assert len(found) + len(before) <= 61  # one was in its hands when it was killed
    wait_until(lambda: lines_in(tmp_path / "p"))


def test_compressed_messages_are_smaller_and_the_same(monkeypatch):
    sizes = []
    load = zmq_store._load

    def weighed(sync, label, tensors):
        parcel = load(sync, label, tensors)
        sizes.append((parcel.label.compression, sum(map(len, parcel.payload))))
        return parcel

    monkeypatch.setattr(zmq_store, "_load", weighed)
    example = make_example(3, num_tokens=500)
    example.hidden_states[:] = torch.arange(8)
    for compression in ("none", "zstd"):
        sync = make_sync(compression=compression)
        with closing(open_source("zmq", sync)) as source:
            sink = open_sink(sync, source.url)
            sink.write(example)
            sink.write(make_example(22))  # noise, and short: would grow
            with in_thread(sink.close):
                found = [line_of(example) for example in source.read()]
        assert found == [line_of(example), line_of(make_example(22))]
    plain = 500 * SCHEMA.token_bytes
    assert [name for name, _ in sizes] == ["none", "none", "zstd", "zstd"]
    assert sizes[0][1] == plain and sizes[2][1] < plain / 4


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Certificate files and public keys, by owner."""
    folder = tmp_path_factory.mktemp("keys")
    made = {}
    for name in ("consumer", "producer", "other"):
        public_file, secret_file = zmq.auth.create_certificates(folder, name)
        public, _ = zmq.auth.load_certificate(secret_file)
        made[name] = {"public_file": public_file, "file": secret_file, "key": public.decode()}
    return made


def curve(keys, key_file=None, server_key=None, **options):
    return make_sync(
        key_file=key_file and keys[key_file]["file"],
        server_key=server_key and keys[server_key]["key"],
        **options,
    )


@pytest.mark.parametrize("theirs", [{"key_file": "producer"}, {}], ids=["keys", "no keys"])
@pytest.mark.parametrize("ours", [{"server_key": "consumer"}, {}], ids=["told", "not told"])
def test_with_the_right_keys_examples_arrive(keys, ours, theirs):
    with closing(open_source("zmq", curve(keys, key_file="consumer", **ours))) as source:
        sink = open_sink(curve(keys, server_key="consumer", **theirs), source.url)
        with in_thread(write_all, sink, range(5)):
            found = [line_of(example) for example in source.read()]
    assert found == [line_of(make_example(number)) for number in range(5)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"key_file": "consumer"}, {}),
        ({"key_file": "consumer"}, {"key_file": "producer", "server_key": "other"}),
        ({}, {"key_file": "producer", "server_key": "consumer"}),
    ],
    ids=["plain producer", "wrong key", "plain consumer"],
)
def test_with_other_keys_nothing_gets_in(keys, ours, theirs):
    sync = curve(keys, **ours, heartbeat_s=0.1)
    with closing(open_source("zmq", sync, timeout_s=0.5)) as source:
        sink = open_sink(curve(keys, **theirs, heartbeat_s=0.1), source.url, timeout_s=0.5)
        with pytest.raises(SpeculatorError, match="Check that training is running, .* keys"):
            sink.write(make_example(1))
        with pytest.raises(SpeculatorError, match="never seen"):
            next(source.read())
        assert source.num_refused == 0
        sink.close()


def test_keys_that_cannot_be_used_are_named_at_once(keys, tmp_path):
    nothing, url = tmp_path / "nothing", "tcp://127.0.0.1:*"
    nothing.write_text("")

    def source(**options):
        return ZmqStore.source(SCHEMA, make_sync(**options), url)

    def sink(**options):
        return open_sink(make_sync(**options), "tcp://127.0.0.1:9")

    ours, key = keys["consumer"], keys["consumer"]["key"]
    tables = [
        (source, {"key_file": tmp_path / "absent"}, "absent cannot be read as CURVE keys"),
        (source, {"key_file": nothing}, "nothing cannot be read as CURVE keys: No public key"),
        (source, {"key_file": ours["public_file"]}, "has no secret key; expected the"),
        (source, {"server_key": key}, "sync.key_file is missing"),
        (source, {"key_file": keys["other"]["file"], "server_key": key}, "the public key in"),
        (sink, {"key_file": ours["file"]}, "sync.server_key is missing"),
        (
            sink,
            {"server_key": "\n" * 40},
            "cannot connect to tcp://127.0.0.1:9 with the keys",
        ),
    ]
    for make, options, complaint in tables:
        with pytest.raises(SpeculatorError, match=re.escape(complaint)):
            make(**options)


def test_addresses_that_cannot_be_used_are_named_at_once():
    with closing(open_source("zmq", make_sync())) as source:
        with pytest.raises(SpeculatorError, match=f"{source.url} cannot be bound: Address"):
            ZmqStore.source(SCHEMA, make_sync(), source.url)
    with pytest.raises(SpeculatorError, match="cannot connect to tcp://nowhere"):
        open_sink(make_sync(), "tcp://nowhere")
    with pytest.raises(SpeculatorError, match="sync.urls is missing"):
        open_sink(make_sync())
