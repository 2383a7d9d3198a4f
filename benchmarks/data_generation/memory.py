"""Peak memory of short and long runs."""

import json
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.data_generation.material import make_plan, make_texts
from benchmarks.data_generation.settings import DataBenchmarkConfig
from benchmarks.ratios import Line, in_process
from speculators_core.data_generation.runs.generate import generate_data


def measure_memory(settings: DataBenchmarkConfig) -> Iterator[Line]:
    """Both runs have the same texts, the long one each of them ten times."""
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
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        texts = make_texts(settings, 16)
        with rows.open("w") as file:
            for _ in range(factor):
                for text in texts:
                    file.write(json.dumps({"input_ids": text.input_ids.tolist()}) + "\n")
        plan = make_plan(
            settings,
            data={"datasets": [{"path": str(rows)}], "deduplicate": False},
            sync={"path": f"{folder}/store", "shard_tokens": 4096},
            run={"allowed_roots": [folder]},
        )
        generate_data(plan)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
