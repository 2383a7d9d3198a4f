"""What whole training runs reach: beside another trainer's speculators, bare steps, and a store.

Data are rows of this interpreter's standard library. Every training is a `speculators train` of its
own, in its own process.
"""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.ratios import Line, in_process, print_lines
from benchmarks.training import PEERS
from speculators_core.flags import Several
from speculators_core.settings import Settings

LAYER_IDS = (1, 3, 4)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": 3},
    "peagle": {"num_depths": 4},
    "dflash": {},
    "mtp": {"num_steps": 3},
}
"""What the peers' drafts were trained for."""


class RunsBenchmarkConfig(Settings):
    """Of parts `peers`, `overhead` and `online`."""

    trainers: Annotated[
        tuple[Literal["equal", "ours"], ...],
        Several,
        Field(min_length=1),
    ] = ("equal", "ours")
    """Beside the peers: AdamW and their loss, and our defaults."""
    peers: Path = PEERS
    """Folder with a verifier, speculators for it, and acceptance.json."""
    rows: int = Field(700, ge=10)
    """Rows to train on."""
    length: int = Field(1024, ge=32)
    """Tokens of each."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Several, Field(min_length=1)] = (0,)
    """Of drafts; the first is that of the rows as well. `peers` tells the median of all."""


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
    import yaml

    from speculators_core.data_generation.runs.generate import generate_data
    from speculators_core.data_generation.settings import read_plan

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
    from benchmarks.playground.corpus import read_library
    from speculators_core.verifier.reading import read_tokenizer

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
    sections: Mapping[str, Mapping[str, Any]],
    output: Path,
) -> dict[str, Any]:
    """The report of a run, with its seconds; ``sections`` win over the peers' own plan."""
    from speculators_core.training.settings import TrainingPlan
    from speculators_core.training.train import train

    base: dict[str, dict[str, Any]] = {
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
    start = time.perf_counter()
    report = train(TrainingPlan.read(plan, "benchmark"))
    return {**report.model_dump(mode="json"), "seconds": time.perf_counter() - start}


def acceptance_length(settings: RunsBenchmarkConfig, speculator: str) -> float:
    """Of the recorded prompts, by the reference decoder; the texts must be the verifier's own."""
    import torch

    from speculators_core.models.speculator import SpeculatorModel

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
    """Equal draft, tokens, learning rate, loss and AdamW; then our own optimizer and loss."""
    plans: dict[str, dict[str, dict[str, Any]]] = {
        "equal": {"optimizer": {"name": "adamw"}},
        "ours": {},
    }
    losses: dict[str, dict[str, Any]] = {"mtp": {"targets": "text", "attention": "independent"}}
    for algorithm in algorithms:
        peer = in_process(acceptance_length, settings, str(settings.peers / algorithm))
        shape = settings.peers / algorithm / "config.json"
        for name in settings.trainers:
            loss = losses.get(algorithm, {}) if name == "equal" else {}
            model = {"draft_config": str(shape), "objective": OBJECTIVES[algorithm] | loss}
            sections = {**plans[name], "model": model, "data": {"store": str(work / "states")}}
            lengths = []
            for seed in settings.seeds:
                output = work / f"{algorithm} {name} {seed}"
                sections["run"] = {"seed": seed}
                report = in_process(train_draft, settings, algorithm, sections, output)
                lengths.append(in_process(acceptance_length, settings, report["speculator"]))
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
"""Steps that are timed in each turn, after some that are not."""


def _step_rates(settings: RunsBenchmarkConfig, work: Path, algorithm: str) -> tuple[float, float]:
    """Tokens a second of the trainer's steps and of bare ones on the same rows, in turns."""
    import torch
    from transformers import TrainerCallback

    from speculators_core.batch import Batch
    from speculators_core.training.job import Job
    from speculators_core.training.rows.sources import Rows
    from speculators_core.training.settings import TrainingPlan

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

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
    clock = Clock()
    ours, bare = [], []
    with Job.open(plan) as job, job.watching(trainer := job.make_trainer()):
        rows = job.rows
        assert isinstance(rows, Rows)
        trainer.add_callback(clock)
        kwargs, _ = job.draft.get_trainer_kwargs(**plan.model.objective)
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
    """Training while data are generated, beside the slower side alone; a thread for each side.

    Both hold out the same rows; their losses over them are compared on the way.
    """
    in_process(_write_online, settings, work)
    generation, training, online = (
        in_process(_alone, what, settings, algorithms[0], work)
        for what in ("generate", "train", "online")
    )
    slower = max((generation, training), key=lambda side: side["seconds"])
    tokens = settings.rows * settings.length
    yield Line(
        what="training online",
        unit="tok/s",
        ours=tokens / online["seconds"],
        beside=f"{slower['what']} alone",
        reference=tokens / slower["seconds"],
        target=0.9,
    )
    for (step, ours), (_, reference) in zip(online["losses"], training["losses"], strict=True):
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


def _num_held_out(settings: RunsBenchmarkConfig) -> int:
    return min(16, settings.rows // 10)


def _write_online(settings: RunsBenchmarkConfig, work: Path) -> None:
    """A plan (online.yaml) of the same rows, those first that training from the store holds out."""
    import yaml

    from speculators_core.training.rows.sources import Split, StoredExamples

    stored = StoredExamples(work / "states")
    split = Split.draw(stored, _num_held_out(settings), None, settings.seeds[0])
    held_out = [example.input_ids.tolist() for example in stored.read(split.held_out)]
    lines = (work / "rows.jsonl").read_text().splitlines(keepends=True)
    lines.sort(key=lambda line: json.loads(line)["input_ids"] not in held_out)
    (work / "online.jsonl").write_text("".join(lines))
    plan = yaml.safe_load((work / "data.yaml").read_text())
    plan["data"]["datasets"] = [{"path": str(work / "online.jsonl")}]
    (work / "online.yaml").write_text(yaml.safe_dump(plan))


def _alone(what: str, settings: RunsBenchmarkConfig, algorithm: str, work: Path) -> dict[str, Any]:
    """Seconds of one side, or of both together, with a thread for each process."""
    import os

    os.environ["OMP_NUM_THREADS"] = "1"
    return in_process(_run_side, what, settings, algorithm, work)


def _run_side(
    what: str, settings: RunsBenchmarkConfig, algorithm: str, work: Path
) -> dict[str, Any]:
    from speculators_core.data_generation.runs.generate import generate_data
    from speculators_core.data_generation.settings import read_plan

    if what == "generate":
        plan = read_plan(work / "data.yaml")
        sync = plan.sync.model_copy(update={"path": work / "again"})
        report = generate_data(plan.model_copy(update={"sync": sync}))
        return {"what": "generation", "seconds": report.seconds}
    source = (
        {"store": str(work / "states")}
        if what == "train"
        else {"online": str(work / "online.yaml")}
    )
    steps = int(0.9 * settings.rows) // EVALUATIONS * EVALUATIONS
    sections: dict[str, dict[str, Any]] = {
        "data": {**source, "eval_examples": _num_held_out(settings)},
        "evaluation": {"decode": False, "roll_outs": 0, "every": steps // EVALUATIONS},
        "run": {"max_steps": steps},
    }
    train_draft(settings, algorithm, sections, work / what)
    log = (work / what / "speculator" / "training_log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    seconds = next(line["train_runtime"] for line in lines if "train_runtime" in line)
    return {
        "what": "training",
        "seconds": seconds * settings.rows / steps,
        "losses": [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line],
    }
