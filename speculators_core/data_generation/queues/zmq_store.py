"""A network queue for several producers and consumers.

Each consumer binds to one URL, producers connect to all of them. With CURVE keys
(`zmq.auth.create_certificates` makes a pair of files) messages are encrypted, and only producers
that know the consumers' public key are admitted; without them, anyone who reaches the port is.
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
from speculators_core.data_generation.queues.sender import QueuedExample, Sender
from speculators_core.data_generation.settings import SyncConfig
from speculators_core.errors import SpeculatorError, first_line

MAX_ANSWER_BYTES = 2**17
"""Maximum size of a consumer's message to a producer."""


class ZmqStore:
    """Both ends of a queue over TCP."""

    @staticmethod
    def sink(
        schema: Schema, sync: SyncConfig, name: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> QueueSink:
        """Sends to the consumers at ``sync.urls``.

        A restarted producer may reuse its name; it is admitted once the consumers have noticed
        that the old one is gone.

        Raises:
            SpeculatorError: the keys cannot be read, or there are no URLs.
        """
        if not sync.urls:
            raise SpeculatorError(
                "sync.urls is missing, which zmq requires: the URLs that the consumers are bound "
                "to. Set it, for example to tcp://host:5555."
            )
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
        """Receives at ``url``: one of ``sync.urls``, or its local address such as `tcp://*:5555`.

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
    """A connected socket; ``keys``: the consumers' public key, our public and our secret key.

    Raises:
        SpeculatorError: the URL or the keys are invalid.
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
            f"sync.urls: cannot connect to {url} with the keys of sync: {first_line(error)}; "
            "expected tcp://host:port and CURVE keys. Correct sync.urls, sync.server_key or "
            "sync.key_file."
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
                f"sync.server_key is {sync.server_key}, expected {public.decode()}, the public "
                f"key in {sync.key_file}. Correct one of the two."
            )
        socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.curve_server = True
    elif sync.server_key is not None:
        raise SpeculatorError(
            "sync.server_key is set but sync.key_file is missing; expected both for a consumer, "
            "which needs its secret key. Set sync.key_file to its `.key_secret` file."
        )
    try:
        socket.bind(url)
    except zmq.ZMQError as error:
        raise SpeculatorError(
            f"{url} cannot be bound: {first_line(error)}; expected a free port of this machine. "
            "End the process that uses it, or choose another URL."
        ) from error
    return socket


def _our_keys(sync: SyncConfig) -> tuple[bytes, bytes, bytes] | None:
    if sync.server_key is None:
        if sync.key_file is not None:
            raise SpeculatorError(
                "sync.key_file is set but sync.server_key is missing; expected both for a "
                "producer. Set sync.server_key to the consumers' public key."
            )
        return None
    ours = zmq.curve_keypair() if sync.key_file is None else _read_keys(sync.key_file)
    return sync.server_key.encode(), *ours


def _read_keys(file: Path) -> tuple[bytes, bytes]:
    try:
        public, secret = zmq.auth.load_certificate(file)
    except (OSError, ValueError) as error:
        raise SpeculatorError(
            f"sync.key_file: {file} cannot be read as CURVE keys: {first_line(error)}. Expected a "
            "file that `zmq.auth.create_certificates` wrote; name another, or make a new pair."
        ) from error
    if secret is None:
        raise SpeculatorError(
            f"sync.key_file: {file} has no secret key; expected the `.key_secret` file. Name that "
            "one."
        )
    return public, secret


def _load(
    sync: SyncConfig, label: Label, tensors: dict[str, Shaped[Tensor, "seq ..."]]
) -> QueuedExample:
    payload = pack_tensors(tensors)
    compression: Literal["none", "zstd"] = "none"
    if sync.compression == "zstd":
        smaller = compress(payload)
        if sum(map(len, smaller)) < sum(map(len, payload)):  # never over max_message_bytes for it
            payload, compression = smaller, "zstd"
    told = {"checksum": checksum(payload), "compression": compression}
    return QueuedExample(label.model_copy(update=told), payload, release=lambda: None)


def _unload(
    schema: Schema, max_bytes: int, label: Label, payload: Sequence[memoryview]
) -> Callable[[], GeneratedExample]:
    if label.file is not None:
        raise FrameError("an example in shared memory, expected its tensors in the message")
    tensors = unpack_tensors(schema, label, payload, max_bytes)
    example = schema.decode(label.key, label.num_prompt_tokens, tensors, repr(label.key[:80]))
    return lambda: example
