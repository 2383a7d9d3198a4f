"""Queues with an engine that writes, and alone."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from benchmarks.data_generation.material import make_examples, make_plan, make_texts
from benchmarks.data_generation.settings import DataBenchmarkConfig, QueueKind
from benchmarks.ratios import Line, alternate, in_process
from speculators_core.data_generation.engines.pipeline import InferencePipeline, schema_of
from speculators_core.data_generation.examples import Example, GeneratedExample, Schema
from speculators_core.data_generation.queues.ends import QueueSink
from speculators_core.data_generation.queues.mp_queue import MPQueueStore
from speculators_core.data_generation.queues.zmq_store import ZmqStore
from speculators_core.data_generation.settings import SyncConfig

PIECE = 8
"""Texts that an engine hands to a queue at a time."""


def measure_queues(settings: DataBenchmarkConfig) -> Iterator[Line]:
    """Compares an engine with a queue with the engine alone, and a queue with a copy in memory."""
    kinds: tuple[QueueKind, ...] = ("mp_queue", "zmq")
    for kind in kinds:
        ours, alone = in_process(_rates_through, settings, kind)
        yield Line(
            what=f"Transformers, through {kind}",
            unit="tok/s",
            ours=ours,
            beside="the engine alone",
            reference=alone,
            target=0.9,
        )
    for kind in kinds:
        ours, copied = in_process(_rates_without_engine, settings, kind)
        yield Line(
            what=f"{kind} alone",
            unit="MB/s",
            ours=ours,
            beside="one copy in memory",
            reference=copied,
            target=None,
        )


def _rates_through(settings: DataBenchmarkConfig, kind: QueueKind) -> tuple[float, float]:
    plan = make_plan(settings, sync={"dtype": settings.dtype})
    schema = schema_of(plan)
    texts = make_texts(settings, settings.texts + PIECE)
    meeting, *pieces = [texts[first : first + PIECE] for first in range(0, len(texts), PIECE)]
    num_tokens = sum(len(text.input_ids) for piece in pieces for text in piece)
    with InferencePipeline.from_config(plan) as engine:

        def alone() -> float:
            start = time.perf_counter()
            for piece in pieces:
                engine.run(piece)
            return num_tokens / (time.perf_counter() - start)

        def through() -> float:
            with _consumed(kind, schema) as sink:
                sink.write_batch(_generated(engine, meeting))  # both sides have met
                start = time.perf_counter()
                for piece in pieces:
                    sink.write_batch(_generated(engine, piece))
                sink.close()
                return num_tokens / (time.perf_counter() - start)

        alone()
        ours, reference = alternate(settings.runs, through, alone)
    return ours, reference


def _generated(engine: InferencePipeline, texts: list[Example]) -> list[GeneratedExample]:
    return [found for found in engine.run(texts) if isinstance(found, GeneratedExample)]


def _rates_without_engine(settings: DataBenchmarkConfig, kind: QueueKind) -> tuple[float, float]:
    schema, examples = make_examples(settings)
    size_mb = sum(example.size_bytes for example in examples) / 1e6

    def through() -> float:
        with _consumed(kind, schema) as sink:
            start = time.perf_counter()
            sink.write_batch(examples)
            sink.close()
            return size_mb / (time.perf_counter() - start)

    def copied() -> float:
        start = time.perf_counter()
        for example in examples:
            example.hidden_states.clone()
        return size_mb / (time.perf_counter() - start)

    ours, reference = alternate(settings.runs, through, copied)
    return ours, reference


@contextmanager
def _consumed(kind: QueueKind, schema: Schema) -> Iterator[QueueSink]:
    """A sink whose examples a fresh process takes as they come."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_consume, args=(kind, schema, theirs))
    process.start()
    try:
        sync = SyncConfig(kind=kind, urls=(ours.recv_bytes().decode(),))
        yield (ZmqStore if kind == "zmq" else MPQueueStore).sink(schema, sync)
    finally:
        process.join()


def _consume(kind: QueueKind, schema: Schema, connection: Connection) -> None:
    torch.set_num_threads(1)  # others of its would wait busily, on cores that the engine needs
    sync = SyncConfig(kind=kind)
    if kind == "zmq":
        source = ZmqStore.source(schema, sync, "tcp://127.0.0.1:*")
    else:
        source = MPQueueStore.source(schema, sync)
    connection.send_bytes(source.url.encode())
    for example in source.read():
        example.hidden_states.sum()
    source.close()
