"""Whole training runs compared with peers and bare steps.

Data are rows of this interpreter's standard library. Every training is a `speculators train` in a
fresh process.
"""

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import JsonValue
from transformers import TrainerCallback

from benchmarks.playground.corpus import read_library
from benchmarks.ratios import Line, in_process, print_lines
from benchmarks.training.settings import RunsBenchmarkConfig, Trainer
from speculators_core.batch import Batch
from speculators_core.data_generation.runs.generate import generate_data
from speculators_core.data_generation.settings import read_plan
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.settings import load_yaml
from speculators_core.training.job import Job
from speculators_core.training.rows.sources import Rows, Split, StoredExamples
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.train import TrainReport, train
from speculators_core.verifier.reading import read_tokenizer

Sections = Mapping[str, Mapping[str, JsonValue]]
"""Sections of a training plan."""
LAYER_IDS = (1, 3, 4)
OBJECTIVES: dict[str, dict[str, JsonValue]] = {
    "eagle3": {"ttt_steps": 3},
    "peagle": {"num_depths": 4},
    "dflash": {},
    "mtp": {"num_steps": 3},
}
"""Objectives of the peers' drafts."""


def measure_runs(
    parts: Sequence[str], settings: RunsBenchmarkConfig, algorithms: Sequence[str]
) -> None:
    """Prints the ratios of each part."""
    measures = {"peers": measure_peers, "overhead": measure_overhead, "online": measure_online}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        in_process(write_data, settings, work)
        for part in parts:
            print_lines(part, measures[part](settings, algorithms, work))


# ---- data ----


def write_data(settings: RunsBenchmarkConfig, work: Path) -> None:
    """Rows of tokens (rows.jsonl), the plan that makes states of them, and the states (states)."""
    rows = list(_library_rows(settings))
    random.Random(settings.seeds[0]).shuffle(rows)
    text = "".join(f"{json.dumps({'input_ids': row})}\n" for row in rows[: settings.rows])
    (work / "rows.jsonl").write_text(text)
    sections = {
        "data": {
            "verifier": str(settings.peers / "verifier"),
            "datasets": [{"path": str(work / "rows.jsonl")}],
            "states": {"layer_ids": list(LAYER_IDS)},
        },
        "engine": {"max_length": settings.length, "dtype": "float32"},
        "sync": {"path": str(work / "states"), "dtype": "float32"},
        "run": {"allowed_roots": [str(work)]},
    }
    (work / "data.yaml").write_text(yaml.safe_dump(sections))
    generate_data(read_plan(work / "data.yaml"))


def _library_rows(settings: RunsBenchmarkConfig) -> Iterator[list[int]]:
    """The library's own source but for its held-out files, in rows without gaps."""
    words = read_tokenizer(str(settings.peers / "verifier"))
    waiting: list[int] = []
    for file in read_library():
        if file.is_held_out:
            continue
        waiting += words(file.text, add_special_tokens=False)["input_ids"]
        while len(waiting) >= settings.length:
            yield waiting[: settings.length]
            waiting = waiting[settings.length :]


# ---- runs ----


def train_draft(
    settings: RunsBenchmarkConfig,
    algorithm: str,
    sections: Sections,
    output: Path,
) -> TrainReport:
    """The report of a run; ``sections`` win over the peers' plan."""
    base: dict[str, dict[str, JsonValue]] = {
        "model": {
            "algorithm": algorithm,
            "verifier": str(settings.peers / "verifier"),
            "objective": OBJECTIVES[algorithm],
        },
        "data": {"row_length": settings.length, "eval_examples": 0},
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"decode": False, "roll_outs": 0},
        "run": {"output": str(output), "seed": settings.seeds[0], "check": False},
    }
    plan = {name: {**base[name], **sections.get(name, {})} for name in base}
    return train(TrainingPlan.read(plan, "benchmark"))


def acceptance_length(settings: RunsBenchmarkConfig, speculator: str) -> float:
    """Acceptance length on the recorded prompts in the reference decoder.

    The texts must be those that the verifier was recorded to write alone.
    """
    recorded = json.loads((settings.peers / "acceptance.json").read_text())
    draft = SpeculatorModel.from_pretrained(
        speculator, verifier=str(settings.peers / "verifier"), dtype=torch.float32
    )
    drafts = accepted = 0
    for prompt, expected in zip(recorded["prompts"], recorded["verifier_only"], strict=True):
        output = draft.generate(
            torch.tensor([prompt]),
            max_new_tokens=recorded["max_tokens"],
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        assert output.sequences[0, len(prompt) :].tolist() == expected
        drafts += output.acceptance[0].num_drafts
        accepted += sum(output.acceptance[0].accepted)
    return 1 + accepted / drafts


# ---- measurements ----


def measure_peers(
    settings: RunsBenchmarkConfig, algorithms: Sequence[str], work: Path
) -> Iterator[Line]:
    """Equal draft, tokens, learning rate, loss and AdamW; then our defaults of the last two."""
    plans: dict[Trainer, Sections] = {"equal": {"optimizer": {"name": "adamw"}}, "ours": {}}
    losses: dict[str, dict[str, JsonValue]] = {
        "mtp": {"targets": "text", "attention": "independent"}
    }
    for algorithm in algorithms:
        peer = in_process(acceptance_length, settings, str(settings.peers / algorithm))
        shape = settings.peers / algorithm / "config.json"
        for name in settings.trainers:
            loss = losses.get(algorithm, {}) if name == "equal" else {}
            sections: Sections = {
                **plans[name],
                "model": {"draft_config": str(shape), "objective": OBJECTIVES[algorithm] | loss},
                "data": {"store": str(work / "states")},
            }
            lengths = []
            for seed in settings.seeds:
                output = work / f"{algorithm} {name} {seed}"
                of_seed = {**sections, "run": {"seed": seed}}
                report = in_process(train_draft, settings, algorithm, of_seed, output)
                lengths.append(in_process(acceptance_length, settings, str(report.speculator)))
            yield Line(
                what=f"{algorithm}, {name}",
                unit="tau",
                ours=statistics.median(lengths),
                beside="the peer's",
                reference=peer,
                target=1.0 if name == "equal" else None,
                digits=".3f",
            )


def measure_overhead(
    settings: RunsBenchmarkConfig, algorithms: Sequence[str], work: Path
) -> Iterator[Line]:
    """A step of the trainer beside forward, backward, clipping and optimizer alone."""
    for algorithm in algorithms:
        ours, bare = in_process(_step_rates, settings, work, algorithm)
        yield Line(
            what=f"{algorithm}, trainer",
            unit="tok/s",
            ours=ours,
            beside="bare steps",
            reference=bare,
            target=0.95,
        )


STEPS = 24
"""Steps of each turn; the first few are not timed."""


class _Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.perf_counter())


def _step_rates(settings: RunsBenchmarkConfig, work: Path, algorithm: str) -> tuple[float, float]:
    """Tokens a second of the trainer's steps and of bare ones on the same rows, in turns."""
    plan = TrainingPlan.read(
        {
            "model": {
                "algorithm": algorithm,
                "verifier": str(settings.peers / "verifier"),
                "draft_config": str(settings.peers / algorithm / "config.json"),
                "objective": OBJECTIVES[algorithm],
            },
            "data": {"store": str(work / "states"), "row_length": settings.length},
            "evaluation": {"decode": False, "roll_outs": 0, "every": 10**6},
            "run": {"output": str(work / f"steps {algorithm}"), "max_steps": STEPS},
        },
        "benchmark",
    )
    plan.run.output.mkdir()
    clock = _Clock()
    ours, bare = [], []
    with Job.open(plan) as job, job.watching(trainer := job.make_trainer()):
        rows = job.rows
        assert isinstance(rows, Rows)
        trainer.add_callback(clock)
        kwargs, _ = job.draft.trainer_kwargs(plan.model.objective)
        weights = [weight for weight in job.draft.parameters() if weight.requires_grad]
        for _ in range(3):
            clock.ends = []
            trainer.train()
            ours.append((clock.ends[-1] - clock.ends[3]) / (len(clock.ends) - 4))
            start, number = 0.0, 0
            for number in range(STEPS):
                if number == 4:
                    start = time.perf_counter()
                tensors = rows[number % len(rows)]
                tensors.pop("row")
                _, loss, _ = job.draft(Batch(**tensors).to(dtype=job.draft.dtype), **kwargs)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
            bare.append((time.perf_counter() - start) / (STEPS - 4))
    rates = [settings.length / statistics.median(seconds) for seconds in (ours, bare)]
    return rates[0], rates[1]


def measure_online(
    settings: RunsBenchmarkConfig, algorithms: Sequence[str], work: Path
) -> Iterator[Line]:
    """Training while data are generated, compared with the slower side alone.

    Each side has one thread. Both trainings hold out the same rows; their losses on them are
    compared too.
    """
    in_process(_write_online, settings, work)
    sides: tuple[Side, ...] = ("generation", "training", "online")
    generation, training, online = (
        in_process(_alone, side, settings, algorithms[0], work) for side in sides
    )
    slower = max((generation, training), key=lambda figures: figures.seconds)
    tokens = settings.rows * settings.length
    yield Line(
        what="training online",
        unit="tok/s",
        ours=tokens / online.seconds,
        beside=f"{slower.side} alone",
        reference=tokens / slower.seconds,
        target=0.9,
    )
    for (step, ours), (_, reference) in zip(online.losses, training.losses, strict=True):
        yield Line(
            what=f"held-out loss at step {step}, online",
            unit="",
            ours=ours,
            beside="from the store",
            reference=reference,
            target=None,
            digits=".3f",
        )


EVALUATIONS = 4
Side = Literal["generation", "training", "online"]


@dataclass(frozen=True)
class SideFigures:
    """Time of generation, of training from a store, or of both at once."""

    side: Side
    seconds: float
    """Time for all rows."""
    losses: tuple[tuple[int, float], ...] = ()
    """Steps and held-out losses."""


def _num_held_out(settings: RunsBenchmarkConfig) -> int:
    return min(16, settings.rows // 10)


def _write_online(settings: RunsBenchmarkConfig, work: Path) -> None:
    """Writes a plan (online.yaml) of the same rows; held-out ones of the store come first."""
    stored = StoredExamples(work / "states")
    split = Split.draw(stored, _num_held_out(settings), None, settings.seeds[0])
    held_out = [example.input_ids.tolist() for example in stored.read(split.held_out)]
    lines = (work / "rows.jsonl").read_text().splitlines(keepends=True)
    lines.sort(key=lambda line: json.loads(line)["input_ids"] not in held_out)
    (work / "online.jsonl").write_text("".join(lines))
    plan = load_yaml((work / "data.yaml").read_text())
    plan["data"]["datasets"] = [{"path": str(work / "online.jsonl")}]
    (work / "online.yaml").write_text(yaml.safe_dump(plan))


def _alone(side: Side, settings: RunsBenchmarkConfig, algorithm: str, work: Path) -> SideFigures:
    """Figures of a side while nothing else runs, with a thread for each process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    return in_process(_run_side, side, settings, algorithm, work)


def _run_side(side: Side, settings: RunsBenchmarkConfig, algorithm: str, work: Path) -> SideFigures:
    if side == "generation":
        plan = read_plan(work / "data.yaml")
        sync = plan.sync.model_copy(update={"path": work / "again"})
        report = generate_data(plan.model_copy(update={"sync": sync}))
        return SideFigures(side, report.seconds)
    source: dict[str, JsonValue] = (
        {"store": str(work / "states")}
        if side == "training"
        else {"online": str(work / "online.yaml")}
    )
    steps = int(0.9 * settings.rows) // EVALUATIONS * EVALUATIONS
    sections: Sections = {
        "data": {**source, "eval_examples": _num_held_out(settings)},
        "evaluation": {"decode": False, "roll_outs": 0, "every": steps // EVALUATIONS},
        "run": {"max_steps": steps},
    }
    train_draft(settings, algorithm, sections, work / side)
    log = (work / side / "speculator" / "training_log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    seconds = next(line["train_runtime"] for line in lines if "train_runtime" in line)
    losses = tuple((line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line)
    return SideFigures(side, seconds * settings.rows / steps, losses)
