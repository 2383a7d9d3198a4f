"""Messages come back as they were sent, and anything else is refused."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators_core.data_generation.examples import Schema
from speculators_core.data_generation.queues.frames import (
    HEADER,
    MAX_BODY_BYTES,
    MAX_TENSORS,
    FrameError,
    Hello,
    Kind,
    Label,
    Message,
    Reason,
    SharedFile,
    Welcome,
    checksum,
    compress,
    pack,
    pack_tensors,
    unpack,
    unpack_tensors,
)
from tests.data_generation.queues.queue_processes import SCHEMA, digest, make_example

LIMIT = 2**20
LABEL = Label(key="0/1", num_tokens=3, num_prompt_tokens=2)
MESSAGES = [
    Message(Kind.HELLO, body=Hello(name="a", store="zmq", holds=SCHEMA)),
    Message(Kind.WELCOME, 2**64 - 1, body=Welcome(room=3, max_message_bytes=LIMIT)),
    Message(Kind.WAIT, body=Reason(reason="full")),
    Message(Kind.REFUSED, body=Reason(reason="never")),
    Message(Kind.EXAMPLE, 5, 2, LABEL, (memoryview(b"one"), memoryview(b""))),
    Message(Kind.EXAMPLE, 5, 3, LABEL.model_copy(update={"file": SharedFile(path="/x", ticket=4)})),
    Message(Kind.END, 5, 4),
    Message(Kind.ACK, 5, 4),
    Message(Kind.BEAT, 5),
    Message(Kind.CLOSING, 5),
]
ids = [f"{i}-{message.kind.name}" for i, message in enumerate(MESSAGES)]


def frames_of(message):
    return [memoryview(bytes(frame)) for frame in pack(message)]


def forged(body=b"", magic=b"SPQ1", version=1, kind=Kind.BEAT, zero=0, told=None):
    """A message whose checksum is right."""
    import zlib

    told = len(body) if told is None else told
    header = HEADER.pack(magic, version, kind, zero, 0, 0, told, 0)
    return [header[:-4] + zlib.crc32(body, zlib.crc32(header)).to_bytes(4, "big"), body]


@pytest.mark.parametrize("message", MESSAGES, ids=ids)
def test_a_message_comes_back_as_it_was(message):
    assert unpack(frames_of(message), LIMIT) == message


@pytest.mark.parametrize("message", MESSAGES, ids=ids)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_of_header_or_body_is_seen(message, data):
    frames = [bytearray(frame) for frame in frames_of(message)]
    part = frames[data.draw(st.integers(0, 1 if frames[1] else 0))]
    position = data.draw(st.integers(0, len(part) - 1))
    part[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FrameError):
        unpack([memoryview(frame) for frame in frames], LIMIT)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=12))
def test_garbage_is_refused(frames):
    with pytest.raises(FrameError):
        unpack([memoryview(frame) for frame in frames], LIMIT)


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        (forged(magic=b"HTTP"), "it begins with b'HTTP'"),
        (forged(version=2), "protocol version 2, expected 1"),
        (forged(kind=0), "unknown message kind 0"),
        (forged(kind=99), "unknown message kind 99"),
        (forged(zero=1), "unknown message kind"),
        (forged(told=7), "the body has 0 bytes, its header states 7"),
        (forged(b" " * (MAX_BODY_BYTES + 1), kind=Kind.WAIT), "the body has 65537 bytes"),
        (forged(b"{}"), "BEAT with a body of 2 bytes"),
        (forged(b"{}", kind=Kind.WAIT), "WAIT: reason: Field required"),
        (forged(b"[" * 60_000, kind=Kind.WAIT), "WAIT: Invalid JSON"),
        (forged(b"\xff", kind=Kind.WAIT), "WAIT: Invalid JSON"),
        (forged(b'{"reason": "a", "more": 1}', kind=Kind.WAIT), "more: Extra inputs"),
        (forged(b'{"reason": "' + b"x" * 2001 + b'"}', kind=Kind.WAIT), "at most 2000"),
        (forged(b'{"room": 0, "max_message_bytes": 1}', kind=Kind.WELCOME), "room: "),
        (forged(b'{"room": "3", "max_message_bytes": 1}', kind=Kind.WELCOME), "room: "),
        (forged() + [b"more"], "BEAT with 4 bytes of tensors"),
        (forged() + [b""] * (MAX_TENSORS + 1), f"{MAX_TENSORS + 3} frames"),
        (forged()[:1], "1 frames"),
        ([], "0 frames"),
    ],
)
def test_a_message_that_is_not_ours_is_named(frames, complaint):
    with pytest.raises(FrameError, match=re.escape(complaint)):
        unpack([memoryview(frame) for frame in frames], LIMIT)


@pytest.mark.parametrize(
    "label",
    [
        b'{"key": "", "num_tokens": 1, "num_prompt_tokens": 1}',
        b'{"key": "' + b"k" * 513 + b'", "num_tokens": 1, "num_prompt_tokens": 1}',
        b'{"key": "\\ud800", "num_tokens": 1, "num_prompt_tokens": 1}',
        b'{"key": "k", "num_tokens": 0, "num_prompt_tokens": 1}',
        b'{"key": "k", "num_tokens": -1, "num_prompt_tokens": -1}',
        b'{"key": "k", "num_tokens": 1, "num_prompt_tokens": 2}',
        b'{"key": "k", "num_tokens": 1.0, "num_prompt_tokens": 1}',
        b'{"key": "k", "num_tokens": 1, "num_prompt_tokens": 1, "compression": "pickle"}',
        b'{"key": "k", "num_tokens": 1, "num_prompt_tokens": 1, "file": {"path": "x"}}',
    ],
)
def test_a_label_out_of_bounds_is_refused(label):
    with pytest.raises(FrameError, match="EXAMPLE: "):
        unpack([memoryview(frame) for frame in forged(label, kind=Kind.EXAMPLE)], LIMIT)


def test_tensors_over_the_limit_are_refused():
    with pytest.raises(FrameError, match="EXAMPLE with 3 bytes of tensors"):
        unpack(frames_of(MESSAGES[4]), 2)


def test_a_refusal_of_another_version_is_read():
    frames = forged(b'{"reason": "too old"}', version=9, kind=Kind.REFUSED)
    message = unpack([memoryview(frame) for frame in frames], LIMIT)
    assert message.body == Reason(reason="too old")


def sent(example, schema, compression="none"):
    payload = pack_tensors(schema.encode(example))
    if compression == "zstd":
        payload = compress(payload)
    label = Label(
        key=example.key,
        num_tokens=len(example.input_ids),
        num_prompt_tokens=example.num_prompt_tokens,
        checksum=checksum(payload),
        compression=compression,
    )
    return label, payload


def received(label, payload, schema, max_bytes=LIMIT):
    tensors = unpack_tensors(schema, label, payload, max_bytes)
    return schema.decode(label.key, label.num_prompt_tokens, tensors, "here")


def schema_of(**changes):
    return Schema.model_validate({**SCHEMA.model_dump(), **changes})


SCHEMAS = {
    "float32": schema_of(dtype="float32"),
    "float16": schema_of(dtype="float16"),
    "bfloat16": SCHEMA,
    "float8": schema_of(dtype="float8_e4m3fn"),
    "top-k": schema_of(logits="top-k", top_k=5),
    "full logits": schema_of(logits="full"),
    "no states": schema_of(layer_ids=(), has_last=False, logits="full"),
}


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))
def test_tensors_come_back_byte_for_byte(schema, compression):
    example = make_example(7, schema)
    encoded = schema.encode(example)
    label, payload = sent(example, schema, compression)
    unaligned = [memoryview(bytearray(b"x" + bytes(part)))[1:] for part in payload]
    for parts in (payload, unaligned):
        tensors = unpack_tensors(schema, label, parts, LIMIT)
        for name, tensor in tensors.items():
            assert bytes(pack_tensors({name: tensor})[0]) == bytes(
                pack_tensors({name: encoded[name]})[0]
            )
            assert tensor.data_ptr() % tensor.dtype.itemsize == 0
        found = received(label, parts, schema)
        assert found.hidden_states.shape == example.hidden_states.shape
        if schema.dtype != "float8_e4m3fn":
            assert digest(found) == digest(example)


def test_tensors_are_not_copied_on_their_way_out():
    encoded = SCHEMA.encode(make_example(5))
    payload = pack_tensors(encoded)
    encoded["hidden_states"].zero_()
    assert set(bytes(payload[2])) == {0}


def test_a_view_does_not_keep_what_it_is_a_part_of():
    batch = torch.zeros(10, 1000, 3, 8, dtype=torch.bfloat16)
    payload = pack_tensors({"hidden_states": batch[0]})
    batch.fill_(1)
    assert set(bytes(payload[0])) == {0}


def test_compression_makes_smaller_what_repeats():
    payload = pack_tensors({"hidden_states": torch.zeros(100, 3, 8)})
    assert sum(map(len, compress(payload))) < sum(map(len, payload)) / 10


def damaged(label, payload, **changes):
    """With the checksum that it should have."""
    return label.model_copy(update={"checksum": checksum(payload), **changes}), payload


def test_damaged_tensors_are_refused():
    label, payload = sent(make_example(6), SCHEMA)
    states, mask = payload[2], payload[1]
    tables = {
        "do not match their checksum": (label, [*payload[:2], states[::-1]]),
        "7 tokens in 2 tensors": damaged(label, payload[:2]),
        "hidden_states has 335 bytes, expected 336": damaged(label, [*payload[:2], states[:-1]]),
        "input_ids has 56 bytes, expected 48": damaged(
            label, payload, num_tokens=6, num_prompt_tokens=1
        ),
        "99999999 tokens": damaged(label, payload, num_tokens=99999999),
        "neither 0 nor 1": damaged(label, [payload[0], memoryview(b"\2" * len(mask)), states]),
        "input_ids: ": damaged(label, payload, compression="zstd"),
    }
    for complaint, (bad_label, bad_payload) in tables.items():
        with pytest.raises(FrameError, match=complaint):
            unpack_tensors(
                SCHEMA, bad_label, [memoryview(bytearray(p)) for p in bad_payload], LIMIT
            )


def test_what_unpacks_to_more_than_is_allowed_is_refused():
    example = make_example(6, num_tokens=500)
    label, payload = sent(example, SCHEMA, "zstd")
    with pytest.raises(FrameError, match="500 tokens"):
        received(label, payload, SCHEMA, max_bytes=500 * SCHEMA.token_bytes - 1)
    bomb = compress([memoryview(bytes(10**7)) for _ in payload])
    with pytest.raises(FrameError, match="input_ids: "):
        received(*damaged(label, bomb), SCHEMA)
