"""How fast data are generated, stored and handed on, beside what is possible at all.

``python -m benchmarks.data_generation``. Each line is a ratio of two rates that are measured in
turns; engines, consumers and whole runs are in processes of their own. Texts are pieces of this
interpreter's standard library.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field

from benchmarks.ratios import Line, alternate, in_process, print_lines
from speculators_core.flags import Several
from speculators_core.settings import Settings

QueueKind = Literal["mp_queue", "zmq"]
Part = Literal["engine", "disk", "queues", "memory"]
NUM_READER_BYTES = 2**22
PIECE = 8
"""Texts that an engine hands to a queue at a time."""


class DataBenchmarkConfig(Settings):
    """What is measured."""

    parts: Annotated[tuple[Part, ...], Several, Field(min_length=1)] = (
        "engine",
        "disk",
        "queues",
        "memory",
    )
    """Measurements."""
    verifier: str | None = None
    """Of engine, queues and memory; the playground's where None."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the verifier."""
    texts: int = Field(64, ge=8)
    """Texts that an engine runs in one measurement."""
    length: int = Field(256, ge=8)
    """Tokens of each."""
    runs: int = Field(5, ge=1)
    """Turns of each measurement; the median counts."""
    megabytes: int = Field(256, ge=1)
    """Of a shard, and of what goes through a queue without an engine."""
    hidden_size: int = Field(1024, ge=8)
    """Of the states in it, four to a token."""


def run(*, settings: Annotated[DataBenchmarkConfig | None, Parameter(name="*")] = None) -> None:
    """Measures engines, stores and queues of data generation."""
    settings = settings or DataBenchmarkConfig()
    measures: dict[str, Callable[[DataBenchmarkConfig], Iterator[Line]]] = {
        "engine": measure_engine,
        "disk": measure_disk,
        "queues": measure_queues,
        "memory": measure_memory,
    }
    print_lines(
        "data generation", (line for part in settings.parts for line in measures[part](settings))
    )


# ---- the engine ----


def measure_engine(settings: DataBenchmarkConfig) -> Iterator[Line]:
    """Prefill of vLLM with the states of an EAGLE-3 handed out, and without."""
    ours, plain = alternate(
        settings.runs,
        lambda: in_process(_rate_with_states, settings),
        lambda: in_process(_rate_of_vllm, settings),
    )
    yield Line(
        what="vLLM, states of 3 layers and the last",
        unit="tok/s",
        ours=ours,
        beside="the same vLLM without",
        reference=plain,
        target=0.85,
    )


def _rate_with_states(settings: DataBenchmarkConfig) -> float:
    from speculators_vllm import offline

    offline.prepare()
    from speculators_core.data_generation.engines.pipeline import InferencePipeline

    plan = _plan(settings, engine={"name": "vllm"})
    with InferencePipeline.from_config(plan) as engine:
        return _rate(settings, engine.forward)


def _rate_of_vllm(settings: DataBenchmarkConfig) -> float:
    from speculators_vllm import offline

    offline.prepare()
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    with offline.loaded(
        model=_plan(settings).data.verifier,
        dtype=settings.dtype,
        max_model_len=settings.length + 1,
        skip_tokenizer_init=True,
        **offline.default_arguments(),
    ) as llm:
        return _rate(
            settings,
            lambda examples: offline.continue_all(
                llm, [example.input_ids.tolist() for example in examples], parameters
            ),
        )


def _rate(settings: DataBenchmarkConfig, work: Callable[[list[Any]], Any]) -> float:
    """Tokens a second, after a round that is not timed; no text is run twice."""
    texts = iter(_texts(settings, 2 * settings.texts))
    work([next(texts) for _ in range(settings.texts)])
    timed = list(texts)
    start = time.perf_counter()
    work(timed)
    return sum(len(text.input_ids) for text in timed) / (time.perf_counter() - start)


def _texts(settings: DataBenchmarkConfig, count: int) -> list[Any]:
    """Pieces of the standard library, each of ``length`` tokens."""
    import torch

    from benchmarks.playground.corpus import read_library
    from speculators_core.data_generation.examples import Example
    from speculators_core.verifier.reading import read_tokenizer

    tokenizer = read_tokenizer(_plan(settings).data.verifier)
    ids: list[int] = []
    for file in read_library():
        ids += tokenizer(file.text)["input_ids"]
        if len(ids) >= count * settings.length:
            break
    rows = torch.tensor(ids[: count * settings.length]).view(count, settings.length)
    mask = torch.ones(settings.length, dtype=torch.bool)
    return [Example(f"0/{number}", row, mask) for number, row in enumerate(rows)]


def _plan(settings: DataBenchmarkConfig, **sections: dict[str, Any]) -> Any:
    from benchmarks.playground import VERIFIER
    from speculators_core.data_generation.settings import GenerationPlan

    content: dict[str, dict[str, Any]] = {
        "data": {"verifier": settings.verifier or str(VERIFIER), "datasets": [{"path": "none"}]},
        "engine": {"max_length": settings.length, "dtype": settings.dtype},
        "sync": {"path": "none"},
    }
    for name, options in sections.items():
        content[name] = content.get(name, {}) | options
    return GenerationPlan.read(content, "benchmark")


# ---- the disk ----


def measure_disk(settings: DataBenchmarkConfig) -> Iterator[Line]:
    """A shard beside safetensors itself, and beside a plain memory map."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from speculators_core.data_generation.stores.disk import DiskStore

    schema, examples = _examples(settings)
    size_mb = sum(example.size_bytes for example in examples) / 1e6
    plain = {
        f"{example.key}/{name}": tensor
        for example in examples
        for name, tensor in schema.encode(example).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        store = DiskStore.create(Path(folder) / "store", schema)
        file = Path(folder) / "plain.safetensors"

        def timed(work: Callable[[], Any]) -> float:
            start = time.perf_counter()
            work()
            return size_mb / (time.perf_counter() - start)

        def written_anew(path: Path, work: Callable[[], Any]) -> float:
            path.unlink(missing_ok=True)
            return timed(work)

        rates = alternate(
            settings.runs,
            lambda: written_anew(store.shard_path(0), lambda: store.write_shard(0, examples)),
            lambda: written_anew(file, lambda: save_file(plain, file)),
        )
        yield Line(
            what="DiskStore writes",
            unit="MB/s",
            ours=rates[0],
            beside="safetensors, the same bytes",
            reference=rates[1],
            target=0.7,
        )
        into = torch.empty(NUM_READER_BYTES, dtype=torch.uint8)

        opened = DiskStore.open(store.folder)

        def read(from_store: DiskStore) -> None:
            for example in from_store.read():
                _copy(example.hidden_states.reshape(-1).view(torch.uint8), into)

        def read_map() -> None:
            mapped = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c"))
            _copy(mapped, into)

        first, later, mapped = alternate(
            settings.runs,
            lambda: timed(lambda: read(DiskStore.open(store.folder))),
            lambda: timed(lambda: read(opened)),
            lambda: timed(read_map),
        )
        for what, rate, target in (
            ("DiskStore reads, checksums compared", first, None),
            ("DiskStore reads, any further time", later, 0.8),
        ):
            yield Line(
                what=what,
                unit="MB/s",
                ours=rate,
                beside="a plain memory map",
                reference=mapped,
                target=target,
            )


def _copy(source: Any, into: Any) -> None:
    """What training does with states: into a row of its own."""
    for first in range(0, len(source), len(into)):
        piece = source[first : first + len(into)]
        into[: len(piece)].copy_(piece)


def _examples(settings: DataBenchmarkConfig, length: int = 1024) -> tuple[Any, list[Any]]:
    """A shard's worth of random states."""
    import torch

    from speculators_core.data_generation.examples import GeneratedExample, Schema

    schema = Schema(
        verifier="none",
        layer_ids=(1, 2, 3, 4),
        has_last=True,
        hidden_size=settings.hidden_size,
        vocab_size=1000,
        dtype="bfloat16",
    )
    count = max(1, round(settings.megabytes * 1e6 / (length * schema.token_bytes)))
    return schema, [
        GeneratedExample(
            key=f"0/{number}",
            input_ids=torch.randint(schema.vocab_size, (length,)),
            loss_mask=torch.ones(length, dtype=torch.bool),
            num_prompt_tokens=length,
            hidden_states=torch.randn(length, 4, settings.hidden_size).bfloat16(),
        )
        for number in range(count)
    ]


# ---- queues ----


def measure_queues(settings: DataBenchmarkConfig) -> Iterator[Line]:
    """An engine that writes to a queue beside the same engine alone; and queues without one."""
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
    from speculators_core.data_generation.engines.pipeline import InferencePipeline, schema_of

    plan = _plan(settings, sync={"dtype": settings.dtype})
    schema = schema_of(plan)
    texts = _texts(settings, settings.texts + PIECE)
    meeting, *pieces = [texts[first : first + PIECE] for first in range(0, len(texts), PIECE)]
    num_tokens = sum(len(text.input_ids) for piece in pieces for text in piece)
    with InferencePipeline.from_config(plan) as engine:

        def alone() -> float:
            start = time.perf_counter()
            for piece in pieces:
                engine.forward(piece)
            return num_tokens / (time.perf_counter() - start)

        def through() -> float:
            with _consumed(kind, schema) as sink:
                sink.write_batch(engine.forward(meeting))  # both sides have met
                start = time.perf_counter()
                for piece in pieces:
                    sink.write_batch(engine.forward(piece))
                sink.close()
                return num_tokens / (time.perf_counter() - start)

        alone()
        ours, reference = alternate(settings.runs, through, alone)
    return ours, reference


def _rates_without_engine(settings: DataBenchmarkConfig, kind: QueueKind) -> tuple[float, float]:
    schema, examples = _examples(settings)
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


class _consumed:
    """A sink whose examples a process of its own takes as they come."""

    def __init__(self, kind: QueueKind, schema: Any) -> None:
        self.kind, self.schema = kind, schema

    def __enter__(self) -> Any:
        from speculators_core.data_generation.queues.mp_queue import MPQueueStore
        from speculators_core.data_generation.queues.zmq_store import ZmqStore
        from speculators_core.data_generation.settings import SyncConfig

        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_consume, args=(self.kind, self.schema, theirs))
        self._process.start()
        sync = SyncConfig(kind=self.kind, urls=(ours.recv_bytes().decode(),))
        return (ZmqStore if self.kind == "zmq" else MPQueueStore).sink(self.schema, sync)

    def __exit__(self, *error: object) -> None:
        self._process.join()


def _consume(kind: QueueKind, schema: Any, connection: Any) -> None:
    import torch

    from speculators_core.data_generation.queues.mp_queue import MPQueueStore
    from speculators_core.data_generation.queues.zmq_store import ZmqStore
    from speculators_core.data_generation.settings import SyncConfig

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


# ---- memory ----


def measure_memory(settings: DataBenchmarkConfig) -> Iterator[Line]:
    """The peak of a run beside that of one ten times as long."""
    short, long = (in_process(_peak_mb, settings, factor) for factor in (1, 10))
    yield Line(
        what="peak memory of a run",
        unit="MB",
        ours=short,
        beside="of one ten times as long",
        reference=long,
        target=0.95,
    )


def _peak_mb(settings: DataBenchmarkConfig, factor: int) -> float:
    from speculators_core.data_generation.runs.generate import generate_data

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        texts = _texts(settings, 16)
        with rows.open("w") as file:
            for _ in range(factor):
                for text in texts:
                    file.write(json.dumps({"input_ids": text.input_ids.tolist()}) + "\n")
        plan = _plan(
            settings,
            data={"datasets": [{"path": str(rows)}], "deduplicate": False},
            sync={"path": f"{folder}/store", "shard_tokens": 4096},
            run={"allowed_roots": [folder]},
        )
        generate_data(plan)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    from speculators_core.cli import run_function

    run_function(run)
