"""Hidden states over ZeroMQ, with bounded memory.

    engine: PUSH, connects  -->  [header, token ids, states]  -->  PULL, bound: the receiver

There is one message per request. The header is JSON (`Header`), the rest raw little-endian bytes. A
sender holds one message until the network has taken it, a receiver a few; then the sender waits,
and its outbox fills.
"""

import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Literal, cast

import numpy as np
import torch
import zmq
from jaxtyping import Shaped, UInt8
from pydantic import Field, ValidationError
from torch import Tensor

from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.settings import Settings
from speculators_vllm.hidden_states.files import FORMAT, HiddenStates

WAIT_S = 0.1
"""How long the sender may take to notice a shutdown."""
MAX_HEADER_BYTES = 2**16

Frame = bytes | memoryview
DtypeName = Literal["float32", "bfloat16", "float16"]


class Header(Settings):
    """First frame; with an ``error`` it is the only one."""

    format: Literal["speculators-hidden-states-1"]
    request_id: str
    name: str
    error: str | None = None
    dtype: DtypeName = "float32"
    layer_ids: tuple[int, ...] = ()
    num_prompt_tokens: int = Field(0, ge=0)
    num_tokens: int = Field(0, ge=0)
    hidden_size: int = Field(0, ge=0)


class Undelivered(SpeculatorError):
    """The engine could not send the states of the request that chose ``name``."""

    def __init__(self, header: Header) -> None:
        super().__init__(f"request {header.request_id} ({header.name}): {header.error}")
        self.name = header.name


def frames_of(states: HiddenStates) -> list[Frame]:
    """The message of a record; its last two frames share the tensors' memory."""
    header = Header(
        format=FORMAT,
        request_id=states.request_id,
        name=states.name,
        dtype=cast(DtypeName, str(states.hidden_states.dtype).removeprefix("torch.")),
        layer_ids=states.layer_ids,
        num_prompt_tokens=states.num_prompt_tokens,
        num_tokens=len(states.token_ids),
        hidden_size=states.hidden_states.shape[-1],
    )
    return [
        header.model_dump_json().encode(),
        _bytes_of(states.token_ids),
        _bytes_of(states.hidden_states),
    ]


def states_of(frames: Sequence[Frame]) -> HiddenStates:
    """The record of a message.

    Raises:
        Undelivered: it reports a failure.
        SpeculatorError: it is not in this format, or inconsistent.
    """
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise SpeculatorError(
            f"its header has {len(frames[0])} bytes, expected at most {MAX_HEADER_BYTES}"
        )
    try:
        header = Header.model_validate_json(bytes(frames[0]))
    except ValidationError as error:
        raise SpeculatorError(f"it has no header of {FORMAT}: {first_fault(error)}") from error
    if header.error is not None:
        raise Undelivered(header)
    dtype: torch.dtype = getattr(torch, header.dtype)
    shape = (header.num_tokens, len(header.layer_ids), header.hidden_size)
    expected = [8 * header.num_tokens, shape[0] * shape[1] * shape[2] * dtype.itemsize]
    found = [len(frame) for frame in frames[1:]]
    if found != expected or 0 in expected:
        raise SpeculatorError(f"its frames have {found} bytes, expected {expected} by its header")
    states = HiddenStates(
        request_id=header.request_id,
        name=header.name,
        layer_ids=header.layer_ids,
        num_prompt_tokens=header.num_prompt_tokens,
        token_ids=_tensor_of(frames[1]).view(torch.int64),
        hidden_states=_tensor_of(frames[2]).view(dtype).view(shape),
    )
    if faults := states.faults():
        raise SpeculatorError(faults)
    return states


def _bytes_of(tensor: Shaped[Tensor, "..."]) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _tensor_of(frame: Frame) -> UInt8[Tensor, "bytes"]:
    """A copy: the frame's memory may be read-only, and not aligned."""
    tensor = torch.empty(len(frame), dtype=torch.uint8)
    tensor.numpy()[:] = np.frombuffer(frame, np.uint8)
    return tensor


class StreamWriter:
    """Sends to one endpoint, and waits where no receiver is bound there."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._stopped = threading.Event()
        self._context: zmq.Context | None = None
        self._socket: zmq.Socket | None = None

    def write(self, states: HiddenStates) -> None:
        """Returns when the network has taken the message.

        Raises:
            SpeculatorError: stopped before it had.
        """
        self._send(frames_of(states))

    def report(self, request_id: str, name: str, reason: str) -> None:
        header = Header(format=FORMAT, request_id=request_id, name=name, error=reason)
        self._send([header.model_dump_json().encode()])

    def _send(self, frames: list[Frame]) -> None:
        socket = self._connected()
        while not socket.poll(int(WAIT_S * 1000), zmq.POLLOUT):
            self._check_stopped()
        tracker = socket.send_multipart(frames, copy=False, track=True)
        assert tracker is not None
        while not tracker.done:
            try:
                tracker.wait(WAIT_S)
            except zmq.NotDone:
                self._check_stopped()

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise SpeculatorError(f"the engine shut down before {self.endpoint} took the states")

    def _connected(self) -> zmq.Socket:
        """Made in the thread that sends, as ZeroMQ requires."""
        if self._socket is None:
            self._context = zmq.Context()
            self._socket = self._context.socket(zmq.PUSH)
            self._socket.sndhwm = 1
            self._socket.copy_threshold = 0  # what is copied counts as sent while it waits
            self._socket.connect(self.endpoint)
        return self._socket

    def stop(self) -> None:
        """Gives up a message that nobody takes; from any thread."""
        self._stopped.set()

    def close(self) -> None:
        if self._context is not None:
            self._context.destroy(linger=0)


class HiddenStateReceiver:
    """Receives from engines at an endpoint: one record per request, in the order of arrival.

        with HiddenStateReceiver("ipc:///tmp/states", timeout_s=60) as receiver:
            for states in receiver: ...

    It holds ``max_waiting`` messages in addition to those in the network; then engines wait.
    """

    def __init__(
        self,
        endpoint: str,
        timeout_s: float = 60.0,
        max_waiting: int = 2,
        max_frame_bytes: int | None = None,
    ) -> None:
        """A sender of a frame with more than ``max_frame_bytes`` is disconnected.

        Raises:
            SpeculatorError: the endpoint cannot be bound.
        """
        self.timeout_s = timeout_s
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.rcvhwm = max_waiting
        self._socket.maxmsgsize = -1 if max_frame_bytes is None else max_frame_bytes
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise SpeculatorError(
                f"{endpoint} cannot be bound: {first_line(error)}. Choose an address of this "
                "machine that nothing else uses."
            ) from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """The address with its port, also where ``tcp://address:*`` was asked for."""

    def has_message(self, timeout_s: float) -> bool:
        """Whether there is one to `receive`, now or within this time."""
        return bool(self._socket.poll(int(timeout_s * 1000)))

    def receive(self, timeout_s: float | None = None) -> HiddenStates:
        """The next record. After an error the one after it can be received.

        Raises:
            Undelivered: a request's states could not be sent.
            SpeculatorError: none came in time, or it is malformed.
        """
        wait_s = self.timeout_s if timeout_s is None else timeout_s
        if not self.has_message(wait_s):
            raise SpeculatorError(
                f"No hidden states came to {self.endpoint} within {wait_s} s. Check that an engine "
                "sends there, or wait longer."
            )
        frames = [frame.buffer for frame in self._socket.recv_multipart(copy=False)]
        try:
            return states_of(frames)
        except Undelivered:
            raise
        except SpeculatorError as error:
            raise SpeculatorError(
                f"A message to {self.endpoint} was refused: {error}; expected hidden states of "
                "this package's connector. Send them with the same version of it."
            ) from error

    def __iter__(self) -> Iterator[HiddenStates]:
        return self

    def __next__(self) -> HiddenStates:
        return self.receive()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def __enter__(self) -> "HiddenStateReceiver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
