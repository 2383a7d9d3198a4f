"""Copies hidden states off the device, for the outbox.

It runs in the worker that sends. On a GPU the copies run on a separate stream, into pinned memory,
while the model runs.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from speculators_core.errors import first_line
from speculators_vllm.hidden_states.files import HiddenStates
from speculators_vllm.hidden_states.outbox import (
    Failure,
    Outbox,
    PendingStates,
    wait_for_room,
    writer_for,
)
from speculators_vllm.hidden_states.settings import FileSink, StreamSink

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**25
"""States that are gathered on the device at a time, in addition to the KV cache."""
IDLE_WAIT_S = 0.01
"""How long a step without tokens waits for the outbox; a new request waits as long."""


@dataclass(frozen=True)
class Save:
    """A finished request whose blocks hold the states of ``token_ids``."""

    request_id: str
    name: str
    token_ids: list[int]
    num_prompt_tokens: int
    block_ids: list[int]


class Courier:
    """Keeps saves, and thereby their blocks, until the outbox has room."""

    def __init__(
        self,
        cache: Float[Tensor, "blocks layers block hidden"],
        block_size: int,
        layer_ids: tuple[int, ...],
        sink: FileSink | StreamSink,
    ) -> None:
        self.cache = cache.transpose(1, 2)  # [blocks, block, layers, hidden]
        self.parts = block_size // cache.shape[2]
        """Blocks of the cache per block of the scheduler, which vLLM may split for its kernels."""
        self.layer_ids = layer_ids
        self.sink = sink
        self.outbox = Outbox(writer_for(sink), sink.max_in_flight_bytes)
        self.waiting: deque[Save] = deque()
        self.copying: dict[str, Callable[[], bool]] = {}
        """By request: whether the copy is complete."""
        self._stream = torch.cuda.Stream(cache.device) if cache.is_cuda else None

    def step(self, saves: list[Save], is_idle: bool) -> set[str]:
        """Copies what the outbox has room for; returns the requests whose blocks were read."""
        self.waiting.extend(saves)
        self._admit()
        copied = self._take_copied()
        if is_idle and not copied and (self.waiting or self.copying or self.outbox.in_flight_bytes):
            self.outbox.progress.wait(IDLE_WAIT_S)
            self.outbox.progress.clear()
        return copied

    def _take_copied(self) -> set[str]:
        copied = {request_id for request_id, arrived in self.copying.items() if arrived()}
        for request_id in copied:
            del self.copying[request_id]
        return copied

    def size_bytes(self, save: Save) -> int:
        return len(save.token_ids) * (self.cache[0, 0].nbytes + 8)

    def _admit(self) -> None:
        while self.waiting and self.outbox.has_room(self.size_bytes(self.waiting[0])):
            self._send(self.waiting.popleft())

    def _send(self, save: Save) -> None:
        try:
            states, arrived, wait = self._copy(save.block_ids, len(save.token_ids))
        except RuntimeError as error:  # out of memory, of the device or of the host
            self.copying[save.request_id] = lambda: True
            self.outbox.put(Failure(save.request_id, save.name, first_line(error)))
            return
        self.copying[save.request_id] = arrived
        record = HiddenStates(
            save.request_id,
            save.name,
            self.layer_ids,
            save.num_prompt_tokens,
            torch.tensor(save.token_ids, dtype=torch.int64),
            states,
        )
        self.outbox.put(PendingStates(record, wait))

    def _copy(
        self, block_ids: list[int], num_tokens: int
    ) -> tuple[Float[Tensor, "seq layers hidden"], Callable[[], bool], Callable[[], None]]:
        """The states in host memory, whether the copy is complete, and how to wait for it."""
        whole = torch.tensor(block_ids, dtype=torch.int64)
        blocks = (whole[:, None] * self.parts + torch.arange(self.parts)).flatten()
        _, block_size, num_layers, hidden_size = self.cache.shape
        states = torch.empty(
            (num_tokens, num_layers, hidden_size),
            dtype=self.cache.dtype,
            pin_memory=self._stream is not None,
        )
        if self._stream is None:
            self._gather(blocks, states, block_size)
            return states, lambda: True, lambda: None
        # Everything the model has written so far; the forward of this step is not in these blocks.
        self._stream.wait_stream(torch.cuda.current_stream(self.cache.device))
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._gather(blocks.pin_memory(), states, block_size)
            done.record(self._stream)
        return states, done.query, done.synchronize

    def _gather(
        self,
        blocks: Int64[Tensor, "blocks"],
        into: Float[Tensor, "seq layers hidden"],
        block_size: int,
    ) -> None:
        """Copies chunk by chunk, so that the device needs little memory.

        A chunk's memory belongs to the current stream, whose next work comes after the copy.
        """
        chunk = max(1, CHUNK_BYTES // self.cache[0].nbytes)
        for first in range(0, len(blocks), chunk):
            ids = blocks[first : first + chunk].to(self.cache.device, non_blocking=True)
            found = self.cache.index_select(0, ids).flatten(0, 1)  # [seq, layers, hidden]
            rows = into[first * block_size : (first + chunk) * block_size]
            rows.copy_(found[: len(rows)], non_blocking=True)

    def close(self) -> None:
        """Sends the rest, as long as the sink's ``linger_s`` allows."""
        deadline = time.monotonic() + self.sink.linger_s
        while self.waiting and wait_for_room(
            self.outbox, self.size_bytes(self.waiting[0]), deadline
        ):
            self._send(self.waiting.popleft())
        for save in self.waiting:
            logger.error("hidden states of request %s were lost at shutdown", save.request_id)
        self.waiting.clear()
        self.outbox.close(max(0.0, deadline - time.monotonic()))
