"""A training run, from data to a checked speculator."""

from contextlib import nullcontext
from pathlib import Path

from pydantic import Field
from transformers import TrainerState

from speculators_core.console import console
from speculators_core.files import write_text
from speculators_core.provenance import this_command
from speculators_core.publishing.card import write_card
from speculators_core.settings import Settings
from speculators_core.training.budget.estimate import print_estimate, refuse
from speculators_core.training.evaluation import worst_cell_of
from speculators_core.training.finish import (
    best_figures,
    card_facts,
    check,
    measure,
    write_speculator,
)
from speculators_core.training.job import Job
from speculators_core.training.ranks import rank
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.states.run_folder import (
    REPORT,
    SPECULATOR,
    check_folder,
    claim,
    is_finished,
    newest_whole_state,
)
from speculators_core.training.stop import describe_kept, reporting_interrupt


class TrainReport(Settings):
    """How a run ended."""

    speculator: Path | None
    """Folder of the checkpoint; None if the run was stopped before its end."""
    saved_state: Path | None = None
    """State from which the same command resumes a run that was stopped; None if it saved nothing,
    or came to its end."""
    steps: int
    best_step: int | None = None
    """Step of the checkpoint's weights; the last one if None."""
    figures: dict[str, float] = Field(default_factory=dict)
    """Evaluation of those weights."""
    verdict: str | None = None
    """Verdict of `speculators check`; None if it was not run."""


def train(plan: TrainingPlan) -> TrainReport:
    """Trains by the plan, or resumes the run in its folder.

    Until plan, data and verifier have been checked, nothing is written but a lock, which is removed
    again. Under torchrun every process calls it, and the first one writes.

    Raises:
        SpeculatorError: plan, data, verifier or folder are at fault, the run does not fit this
            machine, or a loss was not finite.
        KeyboardInterrupt: Ctrl-C or SIGTERM outside of the steps, which finish and save first.
    """
    check_folder(plan)
    if is_finished(plan):
        text = (plan.run.output / REPORT).read_text(encoding="utf-8")
        return TrainReport.model_validate_json(text)
    with (
        claim(plan) if rank() == 0 else nullcontext() as folder,
        reporting_interrupt(plan.run.output),
        Job.open(plan) as job,
    ):
        refuse(job.estimate(is_timed=False))
        job.check_prompts()  # a fault in them leaves no folder
        if folder is not None:
            folder.start(this_command())
        state = job.train()
        if job.was_stopped:
            saved_state = newest_whole_state(plan.run.output)
            return TrainReport(speculator=None, saved_state=saved_state, steps=state.global_step)
        return _end(job, state, is_first=folder is not None)


def _end(job: Job, state: TrainerState, is_first: bool) -> TrainReport:
    plan = job.plan
    speculator = plan.run.output / SPECULATOR
    report = TrainReport(
        speculator=speculator,
        steps=state.global_step,
        best_step=state.best_global_step,
        figures=best_figures(state),
    )
    draft, lengths = job.best_draft(), job.example_lengths()
    if not is_first:
        return report
    facts = card_facts(job, lengths)
    write_speculator(plan, draft, facts)
    del draft
    job.release()  # what follows loads the verifier in processes of its own
    if measured := measure(speculator, plan, job.named_prompts):
        write_card(speculator, facts.model_copy(update={"measured": measured}))
    if plan.run.check:
        report = report.model_copy(update={"verdict": check(speculator, job.plan.model.verifier)})
    write_text(plan.run.output / REPORT, report.model_dump_json(indent=2))
    return report


def rehearse(plan: TrainingPlan) -> None:
    """Prints what the run would take, and trains nothing.

    Raises:
        SpeculatorError: as `train`.
    """
    check_folder(plan)
    with Job.open(plan) as job:
        estimate = job.estimate(is_timed=True)
    print_estimate(estimate)
    refuse(estimate)


def print_report(report: TrainReport) -> None:
    """Prints how the run ended."""
    if report.speculator is None:
        kept = describe_kept(report.saved_state)
        console.print(f"stopped after step {report.steps}; {kept}", markup=False, soft_wrap=True)
        return
    if worst := worst_cell_of(report.figures):
        console.print(f"worst at {worst}", markup=False)
    length = report.figures.get("acceptance_length")
    shown = "" if length is None else f", acceptance length {length:.3f}"
    step = report.best_step or report.steps
    console.print(f"{report.steps} steps; the speculator is of step {step}{shown}", markup=False)
    if report.verdict is not None:
        console.print(f"speculators check: {report.verdict}", markup=False)
    console.print(f"wrote {report.speculator}", markup=False)
