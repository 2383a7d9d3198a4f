"""Examples whose every byte follows from their number, and processes that send and receive them."""

import hashlib
import os
import time
from contextlib import closing
from pathlib import Path

import torch

from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.packing import RowLayout, rows_held
from speculators_core.data_generation.queues.mp_queue import MPQueueStore
from speculators_core.data_generation.queues.zmq_store import ZmqStore
from speculators_core.data_generation.settings import SyncConfig
from tests.data_generation.processes import processes

STORES = {"zmq": ZmqStore, "mp_queue": MPQueueStore}
SCHEMA = Schema(
    verifier="tiny",
    layer_ids=(1, 2, 4),
    has_last=True,
    hidden_size=8,
    vocab_size=50,
    dtype="bfloat16",
)
HEARTBEAT_S = 0.4


def make_sync(kind: str = "zmq", url: str | None = None, **options) -> SyncConfig:
    options = {"queue_size": 4, "heartbeat_s": HEARTBEAT_S} | options
    return SyncConfig(kind=kind, urls=() if url is None else (url,), **options)


def open_source(kind: str, sync: SyncConfig, schema: Schema = SCHEMA, **options):
    """At a free port, or in a folder of its own."""
    if kind == "zmq":
        return ZmqStore.source(schema, sync, "tcp://127.0.0.1:*", **options)
    return MPQueueStore.source(schema, sync, **options)


def open_sink(sync: SyncConfig, *urls: str, schema: Schema = SCHEMA, **options):
    return STORES[sync.kind].sink(schema, sync.model_copy(update={"urls": urls}), **options)


def make_example(number: int, schema: Schema = SCHEMA, num_tokens: int | None = None):
    generator = torch.Generator().manual_seed(number)
    length = num_tokens or 1 + number % 23
    dtype = torch.bfloat16 if schema.dtype == "float8_e4m3fn" else getattr(torch, schema.dtype)
    width = {"none": 0, "top-k": schema.top_k, "full": schema.vocab_size}[schema.logits]
    ids = torch.randint(0, schema.vocab_size, (length, max(width, 1)), generator=generator)
    states = torch.randn(length, schema.num_states, schema.hidden_size, generator=generator)
    return GeneratedExample(
        key=f"0/{number}",
        input_ids=ids[:, 0].clone(),
        loss_mask=torch.rand(length, generator=generator) > 0.5,
        num_prompt_tokens=1 + number % length,
        hidden_states=states.to(dtype),
        logits=torch.randn(length, width, generator=generator).to(dtype) if width else None,
        logit_ids=ids if schema.logits == "top-k" else None,
    )


def digest(example: GeneratedExample) -> str:
    """Of every byte."""
    found = hashlib.blake2b(f"{example.key} {example.num_prompt_tokens}".encode())
    tensors = example.input_ids, example.loss_mask, example.hidden_states
    for tensor in (*tensors, example.logits, example.logit_ids):
        if tensor is not None:
            found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            found.update(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))
    return found.hexdigest()


def expected_lines(numbers) -> list[str]:
    return sorted(line_of(make_example(number)) for number in numbers)


def line_of(example: GeneratedExample) -> str:
    return f"{example.key} {digest(example)}"


def lines_in(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def produce(sync: SyncConfig, name: str, numbers: range, file: Path, pause_s: float = 0) -> None:
    """Writes examples, then a line: how many were acknowledged, peak memory in kB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the process it was forked from
    sink = STORES[sync.kind].sink(SCHEMA, sync, name=name)
    for number in numbers:
        sink.write(make_example(number))
        time.sleep(pause_s)
    sink.close()
    status = Path("/proc/self/status").read_text()
    peak_kb = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    file.write_text(f"{len(sink.take_acknowledged())} {peak_kb}")


def consume(sync: SyncConfig, url: str, options: dict, file: Path, pause_s: float = 0) -> None:
    """A line for each example that has been dealt with; the first tells where it is bound."""
    kind = sync.kind
    source = (
        ZmqStore.source(SCHEMA, sync, url, **options)
        if kind == "zmq"
        else MPQueueStore.source(SCHEMA, sync, **options)
    )
    with closing(source), file.open("a", buffering=1) as log:
        log.write(f"{source.url}\n")
        for example in source.read():
            time.sleep(pause_s)
            log.write(f"{line_of(example)}\n")


def consume_rows(sync: SyncConfig, file: Path, row_length: int) -> None:
    """A line for each packed row that is handed out: the keys of its examples.

    The second row is never dealt with. The first line tells where it is bound.
    """
    source = open_source(sync.kind, sync)
    layout = RowLayout.of(SCHEMA, None, row_length)
    with closing(source), file.open("a", buffering=1) as log:
        log.write(f"{source.url}\n")
        for number, row in enumerate(rows_held(source, layout.rows)):
            log.write(f"{' '.join(example.key for example in row)}\n")
            if number == 1:
                time.sleep(60)


def start(target, *arguments):
    process = processes.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


LONG_S = 120
"""Nothing takes so long, even beside other work."""


def wait_until(is_so, timeout_s: float = LONG_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def leftovers() -> set[str]:
    """Folders of queues, of whatever process."""
    return {name for name in os.listdir("/dev/shm") if "speculators-queue" in name}
