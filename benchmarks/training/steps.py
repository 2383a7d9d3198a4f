"""Speed and memory of training steps by row length.

A step is forward, loss and backward on one packed row of random tokens and states; the verifier is
not run. Every figure comes from a fresh process.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, JsonValue
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.ratios import in_process
from benchmarks.training.peer_steps import (
    AUX_LAYER_IDS,
    MASK_TOKEN_ID,
    MTP_STEP_WEIGHTS,
    peer_seconds,
)
from benchmarks.training.settings import StepsBenchmarkConfig
from speculators_core.batch import Batch
from speculators_core.console import console
from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.registry import MODELS

NUM_VERIFIER_LAYERS = 6
ANCHOR_SHARE = 8
"""Tokens of a DFlash row for each of its anchors."""
RECIPES: dict[str, dict[str, JsonValue]] = {
    "eagle3": {"aux_layer_ids": AUX_LAYER_IDS},
    "peagle": {
        "aux_layer_ids": AUX_LAYER_IDS,
        "mask_token_id": MASK_TOKEN_ID,
        "speculative_tokens": 4,
    },
    "dflash": {
        "aux_layer_ids": AUX_LAYER_IDS,
        "mask_token_id": MASK_TOKEN_ID,
        "num_layers": 2,
        "block_size": 8,
    },
    "mtp": {},
}


class StepFigures(BaseModel):
    """What one draft took for one row length."""

    algorithm: str
    length: int
    seconds: float
    """Median of the timed steps."""
    peak_bytes: int
    """Largest memory beyond that of model and batch."""
    peer_seconds: float | None = None
    """The same of the other library."""

    @property
    def tokens_per_s(self) -> float:
        return self.length / self.seconds


def measure_steps(settings: StepsBenchmarkConfig, algorithms: Sequence[str]) -> None:
    """Prints a table of each draft's steps at each row length.

    Raises:
        SpeculatorError: the folder of the other library has no such package.
    """
    if settings.peer is not None and not (settings.peer / "speculators").is_dir():
        raise SpeculatorError(
            f"--steps.peer: {settings.peer} has no folder speculators; expected the public "
            f"library. Run pip install --no-deps --target {settings.peer} speculators==0.9.0 "
            "hs-connectors==0.9.0 loguru typer."
        )
    table = Table(title="training step", title_justify="left")
    columns = ["draft", "tokens", "tok/s", "peak MiB", "time grows", "memory grows"]
    for column in [*columns, *(["peer tok/s", "ratio"] if settings.peer else [])]:
        table.add_column(column, no_wrap=True)
    for algorithm in algorithms:
        before = None
        for length in settings.lengths:
            figures = measure(settings, algorithm, length)
            table.add_row(
                algorithm,
                str(length),
                f"{figures.tokens_per_s:.0f}",
                f"{figures.peak_bytes / 2**20:.0f}",
                _growth("seconds", before, figures),
                _growth("peak_bytes", before, figures),
                *_beside(figures),
            )
            before = figures
    console.print(table)
    console.print("grows: the exponent e of length^e since the row before")


def _beside(figures: StepFigures) -> list[str]:
    if figures.peer_seconds is None:
        return []
    ratio = figures.peer_seconds / figures.seconds
    return [f"{figures.length / figures.peer_seconds:.0f}", f"{ratio:.2f}"]


def _growth(name: str, before: StepFigures | None, after: StepFigures) -> str:
    if before is None or before.length == after.length:
        return "-"
    if min(getattr(before, name), getattr(after, name)) <= 0:
        return "-"
    ratio = getattr(after, name) / getattr(before, name)
    return f"{math.log(ratio) / math.log(after.length / before.length):.2f}"


def measure(settings: StepsBenchmarkConfig, algorithm: str, length: int) -> StepFigures:
    """Figures from a fresh process, since an earlier peak would hide a lower one."""
    if settings.peer is None:
        return in_process(_measure_here, settings, algorithm, length)
    ours, theirs = [], []
    for _ in range(settings.rounds):
        ours.append(in_process(_measure_here, settings, algorithm, length))
        theirs.append(in_process(_measure_peer, settings, algorithm, length))
    seconds = statistics.median(figures.seconds for figures in ours)
    peer = statistics.median(theirs)
    return ours[0].model_copy(update={"seconds": seconds, "peer_seconds": peer})


def _measure_peer(settings: StepsBenchmarkConfig, algorithm: str, length: int) -> float:
    torch.manual_seed(0)
    config = _verifier_config(settings, length)
    batch = _row(settings, length, torch.device("cpu"), getattr(torch, settings.dtype))
    return peer_seconds(settings, algorithm, config, batch)


def _measure_here(settings: StepsBenchmarkConfig, algorithm: str, length: int) -> StepFigures:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, settings.dtype)
    model, batch, kwargs = _prepare(settings, algorithm, length, device, dtype)

    def step() -> float:
        start = time.perf_counter()
        _, loss, _ = model(batch, **kwargs)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        model.zero_grad()
        return seconds

    start_bytes = _memory_bytes(device, peak=False)
    step()
    peak_bytes = _memory_bytes(device, peak=True) - start_bytes
    seconds = statistics.median(step() for _ in range(settings.timed))
    return StepFigures(algorithm=algorithm, length=length, seconds=seconds, peak_bytes=peak_bytes)


def _memory_bytes(device: torch.device, peak: bool) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    # Not `ru_maxrss`: a process begins with that of the one which started it.
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith(name))
    return kib * 1024


def _prepare(
    settings: StepsBenchmarkConfig,
    algorithm: str,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[SpeculatorModel, Batch, Mapping[str, object]]:
    """A new draft, a packed row, and the other arguments of its forward."""
    config = _verifier_config(settings, length)
    objectives: dict[str, dict[str, JsonValue]] = {
        "eagle3": {"ttt_steps": 3},
        "peagle": {"num_depths": 4, "max_anchors": None},
        "dflash": {"max_anchors": max(1, length // ANCHOR_SHARE)},
        "mtp": {"num_steps": 3},
    }
    if settings.peer is not None:
        objectives["mtp"] |= {"targets": "text", "step_weights": [*MTP_STEP_WEIGHTS]}
    model = MODELS.load(algorithm).from_training_args(
        config, verifier=Qwen3ForCausalLM(config).to(device, dtype), **RECIPES[algorithm]
    )
    kwargs, _ = model.get_trainer_kwargs(**objectives[algorithm])
    batch = _row(settings, length, device, dtype)
    return model.to(device, dtype).train(), batch, kwargs


def _verifier_config(settings: StepsBenchmarkConfig, length: int) -> Qwen3Config:
    hidden = settings.hidden_size
    return Qwen3Config(
        vocab_size=settings.vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=NUM_VERIFIER_LAYERS,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=2 * length,
        tie_word_embeddings=False,
    )


def _row(
    settings: StepsBenchmarkConfig, length: int, device: torch.device, dtype: torch.dtype
) -> Batch:
    hidden, vocab = settings.hidden_size, settings.vocab_size
    rows = torch.arange(length, device=device)
    per_document = math.ceil(length / settings.documents)
    return Batch(
        input_ids=torch.randint(MASK_TOKEN_ID + 1, vocab, (1, length), device=device),
        document_ids=(rows // per_document)[None],
        position_ids=(rows % per_document)[None],
        loss_mask=torch.ones(1, length, dtype=torch.bool, device=device),
        aux_hidden_states=torch.randn(1, length, 3 * hidden, device=device, dtype=dtype),
        last_hidden_states=torch.randn(1, length, hidden, device=device, dtype=dtype),
    )
