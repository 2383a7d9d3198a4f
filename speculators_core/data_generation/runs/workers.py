"""Workers, which run their units through an engine.

Worker i of n takes every n-th unit from the i-th on, independently of the others. There is no
shared work queue: when a worker dies no other is affected, and the next run generates what is
missing.
"""

import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import get_args

import torch
from pydantic import Field

from speculators_core.data_generation.engines.pipeline import InferencePipeline, Steps, schema_of
from speculators_core.data_generation.examples import Failure, GeneratedExample
from speculators_core.data_generation.queues.mp_queue import MPQueueStore
from speculators_core.data_generation.queues.zmq_store import ZmqStore
from speculators_core.data_generation.runs.targets import DiskTarget, QueueTarget, Target
from speculators_core.data_generation.runs.units import Unit, ahead, cut_units
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.data_generation.stores.shards import SUFFIXES
from speculators_core.data_generation.texts.sources import Counts, read_plan_examples
from speculators_core.errors import SpeculatorError
from speculators_core.settings import Settings

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.5


class UnitDone(Settings):
    """A worker's report on a unit."""

    worker: int
    unit: int
    rows: int
    """Rows of the data sets read so far."""
    num_examples: int = 0
    num_tokens: int = 0
    size_bytes: int = 0
    engine_s: float = 0.0
    set_aside: tuple[Failure, ...] = ()
    was_there: bool = False
    """Whether an earlier run had completed it."""


class UnitProgress(Settings):
    """Tokens of a unit that an engine has run, before the unit is stored."""

    unit: int
    num_tokens: int
    """Since the last message about this unit."""


class WorkerDone(Settings):
    """A worker's last message."""

    worker: int
    counts: dict[str, int | dict[str, int]] = Field(default_factory=dict)
    """`sources.Counts` of all rows that were read."""


Told = UnitDone | UnitProgress | WorkerDone


def generate_data_worker(plan: GenerationPlan, worker: int = 0) -> Iterator[Told]:
    """Runs worker ``worker`` of ``run.workers``, and reports each unit once it is stored.

    The plan must come from `preparation.placed`, its folder from `preparation.prepare`.

    Raises:
        SpeculatorError: the engine, the data or the store has a fault.
    """
    counts = Counts()
    schema = schema_of(plan)
    target = _target(plan, worker)
    with ExitStack() as stack:
        thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="store"))
        stack.push(_aborting(target))  # before the thread is waited for: it may wait for a consumer
        engine: InferencePipeline | None = None
        storing: Future[UnitDone] | None = None
        for unit, rows in ahead(_own_units(plan, worker, counts)):
            if target.has(unit):
                yield UnitDone(worker=worker, unit=unit.number, rows=rows, was_there=True)
                continue
            if engine is None:  # only once a text has been read
                engine = InferencePipeline.from_config(_on_device(plan, worker), schema)
                stack.enter_context(engine)
            start = time.monotonic()
            results = yield from _telling(unit.number, engine.steps(unit.examples))
            engine_s = time.monotonic() - start
            if storing is not None:
                yield storing.result()
            done = UnitDone(worker=worker, unit=unit.number, rows=rows, engine_s=engine_s)
            storing = thread.submit(_store, target, unit, results, done)
            del results
        if storing is not None:
            yield storing.result()
    target.close()  # not after an error: a queue would mark the end of the data for its consumers
    yield WorkerDone(worker=worker, counts=counts.as_dict())


def _telling(
    unit: int, steps: Steps
) -> Generator[UnitProgress, None, list[GeneratedExample | Failure]]:
    """Reports the tokens of the steps, not more often than `PROGRESS_EVERY_S`."""
    num_tokens, last_told = 0, time.monotonic()
    while True:
        try:
            num_tokens += next(steps)
        except StopIteration as end:
            return end.value
        if num_tokens and time.monotonic() - last_told >= PROGRESS_EVERY_S:
            yield UnitProgress(unit=unit, num_tokens=num_tokens)
            num_tokens, last_told = 0, time.monotonic()


def _aborting(target: Target) -> Callable[..., None]:
    """An exit callback that aborts the target after an error."""

    def end(kind: object, error: object, trace: object) -> None:
        if kind is not None:
            target.abort()

    return end


def _own_units(plan: GenerationPlan, worker: int, counts: Counts) -> Iterator[tuple[Unit, int]]:
    for unit in cut_units(read_plan_examples(plan, counts), plan):
        if unit.number % plan.run.workers == worker:
            yield unit, counts.rows


def _store(
    target: Target, unit: Unit, results: Sequence[GeneratedExample | Failure], done: UnitDone
) -> UnitDone:
    made = [result for result in results if isinstance(result, GeneratedExample)]
    failed = [result for result in results if isinstance(result, Failure)]
    return done.model_copy(
        update={
            "size_bytes": target.store(unit, results),
            "num_examples": len(made),
            "num_tokens": sum(len(example.input_ids) for example in made),
            "set_aside": tuple(failed),
        }
    )


def _target(plan: GenerationPlan, worker: int) -> Target:
    sync = plan.sync
    if sync.kind == "disk":
        assert sync.path is not None
        store = DiskStore.open(sync.path)
        store.suffix = SUFFIXES[sync.compression]
        return DiskTarget(store)
    sink = ZmqStore.sink if sync.kind == "zmq" else MPQueueStore.sink
    return QueueTarget(sink(schema_of(plan), sync), sync.path, worker)


def _on_device(plan: GenerationPlan, worker: int) -> GenerationPlan:
    """The plan with the worker's GPU; workers of one machine take its GPUs in turn."""
    device = plan.engine.device or ("cuda" if torch.cuda.is_available() else "cpu")
    num_devices = torch.cuda.device_count()
    if device != "cuda" or plan.run.backend != "local" or min(plan.run.workers, num_devices) < 2:
        return plan
    device = f"cuda:{worker % num_devices}"
    return plan.model_copy(update={"engine": plan.engine.model_copy(update={"device": device})})


# ---- processes of this machine ----


def run_here(plan: GenerationPlan) -> Iterator[Told]:
    """Runs one worker in this process, or several in separate processes.

    Raises:
        SpeculatorError: a worker failed or was killed.
    """
    if plan.run.workers == 1:
        yield from generate_data_worker(plan)
        return
    context = multiprocessing.get_context("spawn")
    started = []
    for worker in range(plan.run.workers):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(theirs, to_json(plan), worker), name=f"worker-{worker}"
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        yield from _listen(started)
    except BaseException:
        for process, _ in started:
            process.terminate()
        raise
    finally:
        for process, ours in started:
            process.join()
            ours.close()


def _listen(started: Sequence[tuple[SpawnProcess, Connection]]) -> Iterator[Told]:
    """Messages of the workers, until all are done."""
    running = {ours: process for process, ours in started}
    lost = []
    while running:
        for ours in multiprocessing.connection.wait(list(running)):
            assert isinstance(ours, multiprocessing.connection.Connection)
            try:
                told = read_told(ours.recv_bytes())
            except EOFError:
                process = running.pop(ours)
                process.join()
                lost.append(f"{process.name} {end_of(process.exitcode or 0)}")
                continue
            if isinstance(told, WorkerDone):
                running.pop(ours)
            yield told
    if lost:
        raise SpeculatorError(
            f"{', '.join(lost)}. What the workers stored is kept; pass --run.resume to resume."
        )


def end_of(code: int) -> str:
    """How a process ended, in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with code {code}"


def _work(connection: Connection, plan: str, worker: int) -> None:
    """A worker's process, which sends JSON and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    watch_parent()
    parsed = GenerationPlan.model_validate_json(plan)
    for message in messages_of(lambda: generate_data_worker(parsed, worker)):
        connection.send_bytes(message)


def watch_parent() -> None:
    """Ends this process when its parent ends for any reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def messages_of(work: Callable[[], Iterator[Told]]) -> Iterator[bytes]:
    """A worker's messages as JSON; the last one states the error that stopped it, if any."""
    try:
        for told in work():
            yield json.dumps({type(told).__name__: told.model_dump(mode="json")}).encode()
    except SpeculatorError as error:
        yield json.dumps({"fault": str(error)}).encode()


def read_told(message: bytes) -> Told:
    """Parses a message of `messages_of`.

    Raises:
        SpeculatorError: the message states the worker's error.
    """
    ((kind, content),) = json.loads(message).items()
    if kind == "fault":
        raise SpeculatorError(content)
    known: dict[str, type[Told]] = {one.__name__: one for one in get_args(Told)}
    return known[kind].model_validate(content)


def to_json(plan: GenerationPlan) -> str:
    """The plan for a child process, including its API key."""
    if plan.data.model is not None:
        raise SpeculatorError(
            "data.verifier is a loaded model, which stays in its process. Pass its folder or hub "
            "id to run several workers, Ray, or a separate process."
        )
    content = plan.model_dump(mode="json")
    content["engine"]["api_key"] = plan.engine.api_key
    return json.dumps(content)
