"""Costs of a build, measured on a few prompts."""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from rich.table import Table

from speculators_core.building.build import (
    ANSWERS,
    NAMES,
    STATES,
    Build,
    count_tokens,
    measured_prompts,
)
from speculators_core.building.prompts import TRAIN, PromptsReport, split_prompts
from speculators_core.building.settings import BuildPlan
from speculators_core.console import console
from speculators_core.data_generation.answers.answerer import Answerer
from speculators_core.data_generation.answers.dialogues import Dialogue
from speculators_core.data_generation.runs.generate import generate_data
from speculators_core.errors import SpeculatorError
from speculators_core.registry import ANSWERERS
from speculators_core.settings import Settings
from speculators_core.training.budget.estimate import Estimate, refuse
from speculators_core.training.budget.free_space import DISK, free_disk_bytes
from speculators_core.training.job import Job

REHEARSED_PROMPTS = 8
REHEARSED_TOKENS = 64
"""Tokens of an answer in the rehearsal; a longer one counts as `max_tokens` long."""


class StageEstimate(Settings):
    """What a stage will take; None where that is not known."""

    name: str
    state: Literal["done", "begun", "to do"]
    num_tokens: int | None = None
    """Tokens that the verifier writes or reads, or that are trained on in all passes."""
    seconds: float | None = None
    disk_bytes: int | None = None
    memory_bytes: int | None = None


class _Answered(Settings):
    """Answers of a rehearsal."""

    tokens_each: float
    """Tokens of an answer, at most."""
    rate_tokens_per_s: float


def rehearse(plan: BuildPlan) -> tuple[StageEstimate, ...]:
    """What each stage that is not done will take; nothing is written to the build's folder.

    A few prompts are answered, read and trained on in a temporary folder.

    Raises:
        SpeculatorError: as `build`, or the training does not fit this machine.
    """
    job = Build(plan)
    states, done = _states(job)
    if all(state == "done" for state in states):
        return tuple(StageEstimate(name=name, state="done") for name in NAMES)
    with TemporaryDirectory(prefix="speculators-build-") as name:
        found, estimate = _measure(job, done, Path(name), states)
    _print(found)
    refuse(estimate)
    states_bytes, free = found[2].disk_bytes or 0, free_disk_bytes(job.output)
    if found[2].state == "to do" and states_bytes > free:
        raise SpeculatorError(
            f"the states need {_size(states_bytes)} in {job.output}; {_size(free)} are free. Make "
            "room, or use fewer prompts or another run.output."
        )
    return found


def _states(job: Build) -> tuple[list[Literal["done", "begun", "to do"]], list[Path]]:
    """The state of each stage, and the folders of those that are done."""
    found: list[Literal["done", "begun", "to do"]] = []
    done = []
    for stage in job.stages():
        if stage.folder.read() is None:
            found.append("begun" if stage.folder.has_begun else "to do")
            break
        found.append("done")
        done.append(stage.folder.path)
    found += ["to do"] * (len(NAMES) - len(found))
    return found, done


def _measure(
    job: Build, done: Sequence[Path], folder: Path, states: list[Literal["done", "begun", "to do"]]
) -> tuple[tuple[StageEstimate, ...], Estimate]:
    plan = job.plan
    prompts = done[0] if done else folder / "prompts"
    if done:
        stage = next(iter(job.stages())).folder.read()
        assert stage is not None
        counts = PromptsReport.model_validate(stage.report)
    else:
        counts = split_prompts(plan, job.max_length, job.tokenizer, prompts)
    weights = sum(file.stat().st_size for file in Path(job.verifier).glob("*.safetensors")) or None
    few = folder / ANSWERS
    if len(done) > 1:
        lines = (done[1] / ANSWERS).read_text(encoding="utf-8").splitlines()
        few.write_text("".join(f"{line}\n" for line in _spread(lines)), encoding="utf-8")
        tokens = count_tokens(done[1] / ANSWERS)["num_tokens"]
        answers = StageEstimate(name="answers", state=states[1])
    else:
        found = _answer(job, prompts / TRAIN, few)
        written = round(counts.num_answers * found.tokens_each)
        tokens = min(counts.num_tokens + written, counts.num_train * job.max_length)
        answers = StageEstimate(
            name="answers",
            state=states[1],
            num_tokens=written,
            seconds=written / found.rate_tokens_per_s,
            disk_bytes=8 * tokens,  # of JSON: an id and its mask
            memory_bytes=weights if job.answers_engine != "openai" else None,
        )
    generation = job.generation_plan(few, folder / STATES)
    report = generate_data(generation)
    rate = report.num_tokens / max(report.engine_s, 1e-9)
    reading = StageEstimate(
        name="states",
        state=states[2],
        num_tokens=tokens,
        seconds=None if states[2] == "done" else tokens / rate,
        disk_bytes=tokens * job.state_bytes(generation),
        memory_bytes=weights,
    )
    training = job.training_plan(measured_prompts(prompts), folder / STATES, folder / "run")
    with Job.open(training) as opened:
        estimate = opened.estimate(is_timed=True)
    trained = round(tokens * training.run.epochs)
    if training.run.max_steps is not None:
        rows = training.run.max_steps * training.optimizer.rows_per_step
        trained = rows * training.data.row_length
    speed = estimate.rate_tokens_per_s
    on_disk = [one for one in estimate.budgets if one.place.startswith(DISK)]
    in_memory = [one for one in estimate.budgets if one not in on_disk]
    last = StageEstimate(
        name="training",
        state=states[3],
        num_tokens=trained,
        seconds=None if speed is None else trained / speed,
        disk_bytes=sum(one.needed_bytes for one in on_disk),
        memory_bytes=max((one.needed_bytes for one in in_memory), default=0),
    )
    first = StageEstimate(name="prompts", state=states[0], num_tokens=counts.num_tokens)
    return (first, answers, reading, last), estimate


def _spread(lines: Sequence[str]) -> list[str]:
    count = min(REHEARSED_PROMPTS, len(lines))
    return [lines[number * len(lines) // count] for number in range(count)]


def _answer(job: Build, train: Path, output: Path) -> _Answered:
    """Answers a few of the prompts; their token ids are written to ``output``.

    Raises:
        SpeculatorError: none could be answered.
    """
    sampling = job.plan.answers.sampling
    settings = job.answers_settings(output).answers
    short = min(REHEARSED_TOKENS, sampling.max_tokens)
    settings = settings.model_copy(
        update={"sampling": sampling.model_copy(update={"max_tokens": short})}
    )
    rows = [json.loads(line) for line in _spread(train.read_text("utf-8").splitlines())]
    dialogues = [
        Dialogue(
            f"0/{number}",
            row["messages"],
            row.get("tools"),
            sampling.seed,
            keeps_cut=True,
            template_options=row.get("chat_template_kwargs"),
        )
        for number, row in enumerate(rows)
    ]
    make: type[Answerer] = ANSWERERS.load(job.answers_engine)
    with closing(make(settings)) as answerer:
        start = time.monotonic()
        answered = [one for one in answerer.answer(iter(dialogues)) if one.token_rows]
        seconds = time.monotonic() - start
    if not answered:
        raise SpeculatorError(
            f"the rehearsal had no answer to {len(dialogues)} prompts; the first: "
            f"{dialogues[0].fault or 'the engine reports no token ids'}. Correct its cause."
        )
    lines, lengths = [], []
    for dialogue in answered:
        for row in dialogue.token_rows:
            record = {"input_ids": row.input_ids, "loss_mask": row.loss_mask}
            lines.append(f"{json.dumps(record)}\n")
        each = dialogue.num_tokens / dialogue.num_answers
        lengths.append(float(sampling.max_tokens) if each >= short else each)
    output.write_text("".join(lines), encoding="utf-8")
    written = sum(dialogue.num_tokens for dialogue in answered)
    return _Answered(
        tokens_each=sum(lengths) / len(lengths), rate_tokens_per_s=written / max(seconds, 1e-9)
    )


def _print(stages: Sequence[StageEstimate]) -> None:
    table = Table(title="what the build takes", title_justify="left")
    for column in ("stage", "state", "tokens", "time", "disk", "memory"):
        table.add_column(column, justify="left" if column in ("stage", "state") else "right")
    for one in stages:
        tokens = "" if one.num_tokens is None else f"{one.num_tokens:,}"
        spent = "" if one.seconds is None else str(timedelta(seconds=round(one.seconds)))
        sizes = ("" if n is None else _size(n) for n in (one.disk_bytes, one.memory_bytes))
        table.add_row(one.name, one.state, tokens, spent, *sizes)
    console.print(table)
    total = sum(one.seconds or 0.0 for one in stages if one.state != "done")
    longest = max(stages, key=lambda one: one.seconds or 0.0)
    console.print(
        f"time: {timedelta(seconds=round(total))}, most of it {longest.name}; evaluation and check "
        "come on top. Tokens and time of answers are upper bounds where the rehearsal cut them.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _size(size_bytes: int) -> str:
    unit, name = (2**30, "GiB") if size_bytes >= 2**30 else (2**20, "MiB")
    return f"{size_bytes / unit:.1f} {name}"
