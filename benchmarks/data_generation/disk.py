"""A shard compared with safetensors and a memory map."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.data_generation.material import make_examples
from benchmarks.data_generation.settings import DataBenchmarkConfig
from benchmarks.ratios import Line, alternate
from speculators_core.data_generation.stores.disk import DiskStore

NUM_READER_BYTES = 2**22


def measure_disk(settings: DataBenchmarkConfig) -> Iterator[Line]:
    """Writing, reading for the first time, and reading again."""
    schema, examples = make_examples(settings)
    size_mb = sum(example.size_bytes for example in examples) / 1e6
    plain = {
        f"{example.key}/{name}": tensor
        for example in examples
        for name, tensor in schema.encode(example).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        store = DiskStore.create(Path(folder) / "store", schema)
        file = Path(folder) / "plain.safetensors"

        def timed(work: Callable[[], object]) -> float:
            start = time.perf_counter()
            work()
            return size_mb / (time.perf_counter() - start)

        def written_anew(path: Path, work: Callable[[], object]) -> float:
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


def _copy(source: UInt8[Tensor, "bytes"], into: UInt8[Tensor, "piece"]) -> None:
    """Copies states piece by piece, as training copies them into a row."""
    for first in range(0, len(source), len(into)):
        piece = source[first : first + len(into)]
        into[: len(piece)].copy_(piece)
