"""``speculators train``: from data to a speculator that is proven to serve."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import Field

from speculators_core.console import console, result_alone_on_stdout
from speculators_core.flags import flags_of
from speculators_core.settings import Settings
from speculators_core.training.settings import (
    EvaluationConfig,
    OptimizerConfig,
    TrainDataConfig,
    TrainingPlan,
    TrainModelConfig,
    TrainRunConfig,
    read_training_plan,
)

if TYPE_CHECKING:
    ModelFlags = TrainModelConfig
    DataFlags = TrainDataConfig
    OptimizerFlags = OptimizerConfig
    EvaluationFlags = EvaluationConfig
    RunFlags = TrainRunConfig
else:
    ModelFlags, DataFlags, OptimizerFlags, EvaluationFlags, RunFlags = map(
        flags_of,
        (TrainModelConfig, TrainDataConfig, OptimizerConfig, EvaluationConfig, TrainRunConfig),
    )

STOPPED_EXIT = 143
"""As of a process that SIGTERM ended."""


class TrainReport(Settings):
    """How a run ended."""

    speculator: Path | None
    """Folder of the checkpoint; None where the run was stopped before its end."""
    steps: int
    best_step: int | None = None
    """Whose weights the checkpoint has; the last step's where None."""
    figures: dict[str, float] = Field(default_factory=dict)
    """Of the evaluation of those weights."""
    verdict: str | None = None
    """Of `speculators check`; None where it was not run."""


def run(
    *,
    config: Path | None = None,
    model: Annotated[ModelFlags | None, Parameter(name="model")] = None,
    data: Annotated[DataFlags | None, Parameter(name="data")] = None,
    optimizer: Annotated[OptimizerFlags | None, Parameter(name="optimizer")] = None,
    evaluation: Annotated[EvaluationFlags | None, Parameter(name="evaluation")] = None,
    run: Annotated[RunFlags | None, Parameter(name="run")] = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Trains a speculator. The same command goes on with a run that was stopped or killed.

    Parameters
    ----------
    config
        YAML file with the sections model, data, optimizer, evaluation and run; flags win over it.
    dry_run
        Print parameters, memory, tokens, time and disk, and train nothing.
    as_json
        Print the report as JSON.
    """
    sections = {
        "model": model,
        "data": data,
        "optimizer": optimizer,
        "evaluation": evaluation,
        "run": run,
    }
    plan = read_training_plan(config, sections)
    if dry_run:
        _print_estimate(plan)
        return
    is_first = os.environ.get("RANK", "0") == "0"
    with result_alone_on_stdout() if as_json else nullcontext():
        report = train(plan)
    if is_first and as_json:
        print(report.model_dump_json(indent=2))
    elif is_first:
        print_report(report)
    if report.speculator is None:
        sys.exit(STOPPED_EXIT)


def train(plan: TrainingPlan) -> TrainReport:
    """Trains what the plan asks for, or goes on with the run that is in its folder.

    Before plan, data and verifier have been looked at, nothing is written but a lock, which goes
    again. Under torchrun every process calls it, and the first one writes.

    Raises:
        SpeculatorError: plan, data, verifier or folder are at fault, the run does not fit this
            machine, or a loss was not finite.
    """
    from speculators_core.provenance import this_command
    from speculators_core.training.budget.estimate import refuse
    from speculators_core.training.job import Job
    from speculators_core.training.ranks import rank
    from speculators_core.training.states.run_folder import REPORT, check_folder, claim, is_finished

    check_folder(plan)
    if is_finished(plan):
        text = (plan.run.output / REPORT).read_text(encoding="utf-8")
        return TrainReport.model_validate_json(text)
    with claim(plan) if rank() == 0 else nullcontext() as folder, Job.open(plan) as job:
        refuse(job.estimate(is_timed=False))
        _ = job.prompts  # a fault in them leaves no folder behind
        if folder is not None:
            folder.start(this_command())
        state = job.train()
        if job.was_stopped:
            return TrainReport(speculator=None, steps=state.global_step)
        return _end(job, is_first=folder is not None)


def _end(job: Any, is_first: bool) -> TrainReport:
    from speculators_core.files import write_text
    from speculators_core.publishing.card import write_card
    from speculators_core.training.finish import (
        best_figures,
        card_facts,
        check,
        measure,
        write_speculator,
    )
    from speculators_core.training.states.run_folder import REPORT, SPECULATOR

    plan, state = job.plan, job.trainer.state
    speculator = plan.run.output / SPECULATOR
    report = TrainReport(
        speculator=speculator,
        steps=state.global_step,
        best_step=state.best_global_step,
        figures=best_figures(state),
    )
    draft = job.best_draft()
    if not is_first:
        return report
    facts = card_facts(job)
    write_speculator(plan, draft, facts)
    del draft
    job.release()  # what follows loads the verifier in processes of its own
    if measured := measure(speculator, plan, job.named_prompts):
        write_card(speculator, facts.model_copy(update={"measured": measured}))
    if plan.run.check:
        report = report.model_copy(update={"verdict": check(speculator, job.plan.model.verifier)})
    write_text(plan.run.output / REPORT, report.model_dump_json(indent=2))
    return report


def _print_estimate(plan: TrainingPlan) -> None:
    from speculators_core.training.budget.estimate import print_estimate, refuse
    from speculators_core.training.job import Job
    from speculators_core.training.states.run_folder import check_folder

    check_folder(plan)
    with Job.open(plan) as job:
        estimate = job.estimate(is_timed=True)
    print_estimate(estimate)
    refuse(estimate)


def print_report(report: TrainReport) -> None:
    """What became of the run, on the terminal."""
    if report.speculator is None:
        console.print(f"stopped after step {report.steps}; the same command goes on from there")
        return
    length = report.figures.get("acceptance_length")
    shown = "" if length is None else f", acceptance length {length:.3f}"
    step = report.best_step or report.steps
    console.print(f"{report.steps} steps; the speculator is of step {step}{shown}", markup=False)
    if report.verdict is not None:
        console.print(f"speculators check: {report.verdict}", markup=False)
    console.print(f"wrote {report.speculator}", markup=False)
