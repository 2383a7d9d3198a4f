"""Examples over the network: several producers, several consumers, on several machines.

Consumers are bound to one URL each, producers connect to all of them. With CURVE keys
(`zmq.auth.create_certificates` makes a pair of files) what is sent is encrypted, and only those
get in who know the consumers' public key; without them anybody does who reaches the port.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import zmq
import zmq.auth
from jaxtyping import Shaped
from torch import Tensor

from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.queues.ends import (
    TIMEOUT_S,
    QueueSink,
    QueueSource,
    unique_name,
)
from speculators_core.data_generation.queues.frames import (
    MAX_BODY_BYTES,
    FrameError,
    Hello,
    Label,
    checksum,
    compress,
    pack_tensors,
    unpack_tensors,
)
from speculators_core.data_generation.queues.receiver import Receiver
from speculators_core.data_generation.queues.sender import Parcel, Sender
from speculators_core.data_generation.settings import SyncConfig
from speculators_core.errors import SpeculatorError, first_line

MAX_ANSWER_BYTES = 2**17
"""Of a consumer to a producer."""


class ZmqStore:
    """Both ends of a queue over TCP."""

    @staticmethod
    def sink(
        schema: Schema, sync: SyncConfig, name: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> QueueSink:
        """Sends to the consumers at ``sync.urls``.

        A producer that is started again may have its old name; it is let in when the consumers
        have noticed that the old one has gone.

        Raises:
            SpeculatorError: the keys cannot be read, or there are no URLs.
        """
        if not sync.urls:
            raise SpeculatorError("sync.urls is missing: where the consumers are bound.")
        hello = Hello(name=name or unique_name(), store="zmq", holds=schema)
        sender = Sender(sync.urls, hello, sync, timeout_s, partial(connect, keys=_our_keys(sync)))
        return QueueSink(schema, sync.max_message_bytes, sender, partial(_load, sync))

    @staticmethod
    def source(
        schema: Schema,
        sync: SyncConfig,
        url: str,
        num_producers: int = 1,
        timeout_s: float = TIMEOUT_S,
    ) -> QueueSource:
        """Receives at ``url``, one of ``sync.urls`` or what leads there: `tcp://*:5555`.

        Raises:
            SpeculatorError: the keys cannot be read, or the URL is taken.
        """
        hello = Hello(name="consumer", store="zmq", holds=schema)
        open_socket = partial(bind, url=url, sync=sync)
        unload = partial(_unload, schema, sync.max_message_bytes)
        return QueueSource(
            schema, Receiver(hello, sync, num_producers, timeout_s, open_socket, unload)
        )


def connect(
    context: zmq.Context, url: str, keys: tuple[bytes, bytes, bytes] | None = None
) -> zmq.Socket:
    """``keys``: the consumers' public one, our public and our secret one.

    Raises:
        SpeculatorError: it is no URL, or those are no keys.
    """
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)  # what is under way is counted by the sender
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        if keys is not None:
            socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = keys
        socket.connect(url)
    except zmq.ZMQError as error:
        raise SpeculatorError(
            f"{url} cannot be connected to, with the keys of sync: {first_line(error)}."
        ) from error
    return socket


def bind(context: zmq.Context, url: str, sync: SyncConfig) -> zmq.Socket:
    """Raises:
    SpeculatorError: the keys cannot be read, or the URL is taken.
    """
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.MAXMSGSIZE, max(sync.max_message_bytes, MAX_BODY_BYTES))
    socket.setsockopt(zmq.SNDHWM, 2 * sync.queue_size + 1000)
    if sync.key_file is not None:
        public, secret = _read_keys(sync.key_file)
        if sync.server_key not in (None, public.decode()):
            raise SpeculatorError(
                f"sync.server_key is not the public key in {sync.key_file}: {public.decode()}."
            )
        socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.curve_server = True
    elif sync.server_key is not None:
        raise SpeculatorError("sync.key_file is missing: a consumer needs its secret key.")
    try:
        socket.bind(url)
    except zmq.ZMQError as error:
        raise SpeculatorError(f"{url} cannot be bound: {first_line(error)}.") from error
    return socket


def _our_keys(sync: SyncConfig) -> tuple[bytes, bytes, bytes] | None:
    if sync.server_key is None:
        if sync.key_file is not None:
            raise SpeculatorError("sync.server_key is missing: the consumers' public key.")
        return None
    ours = zmq.curve_keypair() if sync.key_file is None else _read_keys(sync.key_file)
    return sync.server_key.encode(), *ours


def _read_keys(file: Path) -> tuple[bytes, bytes]:
    try:
        public, secret = zmq.auth.load_certificate(file)
    except (OSError, ValueError) as error:
        raise SpeculatorError(
            f"{file} cannot be read as CURVE keys: {first_line(error)}."
        ) from error
    if secret is None:
        raise SpeculatorError(f"{file} has no secret key; expected the `.key_secret` file.")
    return public, secret


def _load(sync: SyncConfig, label: Label, tensors: dict[str, Shaped[Tensor, "seq ..."]]) -> Parcel:
    payload = pack_tensors(tensors)
    compression: Literal["none", "zstd"] = "none"
    if sync.compression == "zstd":
        smaller = compress(payload)
        if sum(map(len, smaller)) < sum(map(len, payload)):  # never over max_message_bytes for it
            payload, compression = smaller, "zstd"
    told = {"checksum": checksum(payload), "compression": compression}
    return Parcel(label.model_copy(update=told), payload, release=lambda: None)


def _unload(
    schema: Schema, max_bytes: int, label: Label, payload: Sequence[memoryview]
) -> Callable[[], GeneratedExample]:
    if label.file is not None:
        raise FrameError("an example in a file")
    tensors = unpack_tensors(schema, label, payload, max_bytes)
    example = schema.decode(label.key, label.num_prompt_tokens, tensors, repr(label.key[:80]))
    return lambda: example
