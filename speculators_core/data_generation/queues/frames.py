"""The wire protocol between producers and consumers.

    header | body, JSON of its kind | tensor | tensor | ...     frames of one ZeroMQ message

    producer                           consumer
    HELLO    name, schema        -->
                                 <--   WELCOME  maximum number of unacknowledged examples
                                 <--   WAIT     why not now, or no longer: send HELLO again
                                 <--   REFUSED  why never
    EXAMPLE  label, tensors      -->
                                 <--   ACK      the reader has processed it
    CLOSING  all is sent         -->
    END      all is acknowledged -->
                                 <--   ACK
    BEAT                        <-->   BEAT

After CLOSING, only examples follow that were unacknowledged when another consumer was lost.

The consumer draws a number for each session. EXAMPLE and END messages are counted from 0 within
it, so a replayed or duplicated message is recognised.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch
from jaxtyping import Shaped
from pyarrow import Codec
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from speculators_core.data_generation.examples import KEY_LENGTH, FieldSpec, Schema
from speculators_core.errors import first_fault
from speculators_core.settings import Settings

MAGIC = b"SPQ1"
VERSION = 1
HEADER = struct.Struct("!4sBBHQQII")
"""Magic, version, kind, 0, session, number, body length, CRC-32 of the above and the body."""
MAX_BODY_BYTES = 2**16
MAX_TENSORS = 8


class FrameError(ValueError):
    """A received message is invalid."""


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    WAIT = 3
    REFUSED = 4
    EXAMPLE = 5
    END = 6
    ACK = 7
    BEAT = 8
    CLOSING = 9


class Hello(Settings):
    """A producer's request to join, with the schema of its examples."""

    name: str = Field(min_length=1, max_length=128)
    store: Literal["zmq", "mp_queue"]
    holds: Schema


class Welcome(Settings):
    room: int = Field(ge=1)
    """Maximum number of unacknowledged examples."""
    max_message_bytes: int = Field(ge=1)


class Reason(Settings):
    reason: str = Field(max_length=2000)


class SharedFile(Settings):
    """The place of an example in shared memory."""

    path: str = Field(min_length=1, max_length=4096)
    ticket: int = Field(ge=1, lt=2**63)
    """Number in the file's first bytes while the file holds this example."""


class Label(Settings):
    """An example without its tensors."""

    key: str = Field(min_length=1, max_length=KEY_LENGTH)
    num_tokens: int = Field(ge=1)
    num_prompt_tokens: int = Field(ge=1)
    checksum: int = 0
    """CRC-32 of the tensors, as sent."""
    compression: Literal["none", "zstd"] = "none"
    file: SharedFile | None = None

    @model_validator(mode="after")
    def _prompt_is_a_part(self) -> "Label":
        if self.num_prompt_tokens > self.num_tokens:
            raise ValueError(
                f"num_prompt_tokens {self.num_prompt_tokens} exceeds num_tokens {self.num_tokens}"
            )
        return self


BODIES: dict[Kind, type[Settings]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.WAIT: Reason,
    Kind.REFUSED: Reason,
    Kind.EXAMPLE: Label,
}
NUMBERED = (Kind.EXAMPLE, Kind.END, Kind.ACK)


@dataclass(frozen=True)
class Message:
    kind: Kind
    session: int = 0
    number: int = 0
    body: Settings | None = None
    payload: Sequence[memoryview] = ()


def pack(message: Message) -> list[bytes | memoryview]:
    """The message's frames; tensors are not copied."""
    body = b"" if message.body is None else message.body.model_dump_json().encode()
    fields = (MAGIC, VERSION, message.kind, 0, message.session, message.number, len(body))
    header = HEADER.pack(*fields, _checksum(HEADER.pack(*fields, 0), body))
    return [header, body, *message.payload]


def unpack(frames: Sequence[memoryview], max_payload_bytes: int) -> Message:
    """The message, with its tensors unchecked.

    A refusal is read in every protocol version, so that a producer can report its reason.

    Raises:
        FrameError: the frames are damaged, or not of this protocol.
    """
    if not 2 <= len(frames) <= 2 + MAX_TENSORS or len(frames[0]) != HEADER.size:
        raise FrameError(f"not a message of this protocol: {len(frames)} frames")
    magic, version, kind, zero, session, number, num_bytes, checksum = HEADER.unpack(frames[0])
    if magic != MAGIC:
        raise FrameError(f"not a message of this protocol: it begins with {magic!r}")
    if version != VERSION and kind != Kind.REFUSED:
        raise FrameError(f"protocol version {version}, expected {VERSION}")
    if kind not in Kind.__members__.values() or zero:
        raise FrameError(f"unknown message kind {kind}")
    if num_bytes > MAX_BODY_BYTES or len(frames[1]) != num_bytes:
        raise FrameError(f"the body has {len(frames[1])} bytes, its header states {num_bytes}")
    body, payload = bytes(frames[1]), tuple(frames[2:])
    if _checksum(bytes(frames[0][:-4]) + bytes(4), body) != checksum:
        raise FrameError("header and body do not match their checksum")
    kind = Kind(kind)
    if (number and kind not in NUMBERED) or (session and kind == Kind.HELLO):
        raise FrameError(f"{kind.name} with unexpected number {number} or session {session}")
    num_payload_bytes = sum(len(frame) for frame in payload)
    if (payload and kind != Kind.EXAMPLE) or num_payload_bytes > max_payload_bytes:
        raise FrameError(
            f"{kind.name} with {num_payload_bytes} bytes of tensors, expected at most "
            f"{max_payload_bytes if kind == Kind.EXAMPLE else 0}"
        )
    return Message(kind, session, number, _read_body(kind, body), payload)


def _read_body(kind: Kind, body: bytes) -> Settings | None:
    if kind not in BODIES:
        if body:
            raise FrameError(f"{kind.name} with a body of {len(body)} bytes, expected none")
        return None
    try:
        return BODIES[kind].model_validate_json(body, strict=True)
    except ValidationError as error:
        raise FrameError(f"{kind.name}: {first_fault(error)}") from error


def pack_tensors(tensors: dict[str, Shaped[Tensor, "seq ..."]]) -> tuple[memoryview, ...]:
    """The tensors' memory, in the schema's order.

    A view of a larger tensor is copied, so that the queue does not keep the rest in memory.
    """
    return tuple(
        bytes_of(t.clone() if t.untyped_storage().nbytes() > t.nbytes else t)
        for t in tensors.values()
    )


def compress(payload: Sequence[memoryview]) -> tuple[memoryview, ...]:
    """Each part, compressed separately."""
    found = [_zstd().compress(part) for part in payload]
    return tuple(memoryview(part)[: part.size] for part in found)  # the rest is spare room


def unpack_tensors(
    schema: Schema, label: Label, payload: Sequence[memoryview], max_bytes: int
) -> dict[str, Shaped[Tensor, "seq ..."]]:
    """The tensors, as views of the message's memory where alignment allows.

    Raises:
        FrameError: they are damaged, their size does not match the label, or they would exceed
            ``max_bytes`` when decompressed.
    """
    fields = schema.fields
    if len(payload) != len(fields) or label.num_tokens * schema.token_bytes > max_bytes:
        raise FrameError(
            f"{label.num_tokens} tokens in {len(payload)} tensors, expected {len(fields)} tensors "
            f"of at most {max_bytes} bytes"
        )
    if checksum(payload) != label.checksum:
        raise FrameError("the tensors do not match their checksum")
    tensors = {}
    for (name, spec), part in zip(fields.items(), payload, strict=True):
        expected = label.num_tokens * row_bytes(spec)
        if label.compression == "zstd":
            try:
                part = memoryview(_zstd().decompress(part, decompressed_size=expected))
            except OSError as error:
                raise FrameError(f"{name}: {error}") from error
        if len(part) != expected:
            raise FrameError(f"{name} has {len(part)} bytes, expected {expected}")
        tensors[name] = tensor_of(part, spec, label.num_tokens)
    return tensors


def checksum(payload: Sequence[memoryview]) -> int:
    found = 0
    for part in payload:
        found = zlib.crc32(part, found)
    return found


def row_bytes(spec: FieldSpec) -> int:
    """Bytes per token."""
    return spec.dtype.itemsize * torch.Size(spec.tail).numel()


def bytes_of(tensor: Shaped[Tensor, "..."]) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data


def tensor_of(part: memoryview, spec: FieldSpec, num_tokens: int) -> Shaped[Tensor, "seq ..."]:
    """A view of the bytes, or a copy where they are not aligned.

    Raises:
        FrameError: a boolean is neither 0 nor 1.
    """
    found = torch.frombuffer(part, dtype=torch.uint8) if len(part) else torch.empty(0).byte()
    if found.data_ptr() % spec.dtype.itemsize:
        found = found.clone()
    if spec.dtype is torch.bool and (found > 1).any():
        raise FrameError("a boolean is neither 0 nor 1")
    return found.view(spec.dtype).view(num_tokens, *spec.tail)


def _checksum(header: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(header))


def _zstd() -> Codec:
    return Codec("zstd")
