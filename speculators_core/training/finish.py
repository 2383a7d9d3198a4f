"""End of a run: checkpoint, card, check, measurement."""

import json
import logging
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pydantic import ValidationError
from transformers import TrainerState

from speculators_core.data_generation.lengths import Lengths
from speculators_core.decoding.prompts import Prompt
from speculators_core.diagnosis.acceptance_report import AcceptanceReport
from speculators_core.diagnosis.check_report import CheckReport
from speculators_core.errors import SpeculatorError
from speculators_core.files import replaced_folder, write_text
from speculators_core.format.checkpoint import as_dtype, is_hub_id
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.provenance import environment
from speculators_core.publishing.card import REPOSITORY, VERIFIER, write_card
from speculators_core.publishing.card_facts import (
    CardFacts,
    CategoryAcceptance,
    ContextAcceptance,
    DataFacts,
    Measurement,
    TrainingFacts,
)
from speculators_core.registry import COMMANDS
from speculators_core.training.evaluation import counts_by_context
from speculators_core.training.job import LOG, Job
from speculators_core.training.ranks import environment_without_ranks
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.states.run_folder import CONFIG, PROVENANCE, SPECULATOR

logger = logging.getLogger(__name__)

CHECK = "check.json"
MEASURED = "acceptance"
PROMPTS = "prompts.jsonl"


def write_speculator(plan: TrainingPlan, draft: SpeculatorModel, facts: CardFacts) -> None:
    """Writes ``run/speculator`` whole or not at all: checkpoint, card and records of the run."""
    run = plan.run.output
    with replaced_folder(run / SPECULATOR) as part:
        draft.to("cpu", as_dtype(plan.run.saved_dtype)).save_pretrained(part)
        for name in (CONFIG, PROVENANCE, LOG):
            if (run / name).exists():
                shutil.copyfile(run / name, part / name)
        write_card(part, facts)


def best_figures(state: TrainerState) -> dict[str, float]:
    """Figures of the evaluation at the speculator's weights."""
    found: dict[str, float] = {}
    for line in _lines_of_best(state):
        found |= {n.removeprefix("eval_"): v for n, v in line.items() if n.startswith("eval_")}
    return found


def _lines_of_best(state: TrainerState) -> list[dict[str, float]]:
    """Log lines at the step of the speculator's weights, at least one."""
    step = state.best_global_step or state.global_step
    return [line for line in state.log_history if line["step"] == step]


def card_facts(job: Job, lengths: Lengths) -> CardFacts:
    """The run's facts for the model card, before its speculator is measured.

    ``lengths``: lengths of the examples that were trained on.
    """
    plan = job.plan
    assert job.trainer is not None
    state, here = job.trainer.state, environment()
    return CardFacts(
        license=plan.run.license,
        data=_data_facts(job),
        training=TrainingFacts(
            num_steps=state.global_step,
            best_step=state.best_global_step,
            num_tokens=int(_lines_of_best(state)[-1]["num_tokens"]),
            optimizer=plan.optimizer.name,
            learning_rate=plan.optimizer.learning_rate,
            row_length=plan.data.row_length,
            lengths=lengths if lengths.num_examples else None,
            schedule=plan.optimizer.schedule,
            started_from=plan.model.start_from,
            chosen=job.draft.config.guesses,
            hardware=here["device"],
        ),
        versions=here,
        measured=_measured_on_the_way(job, here),
    )


def _measured_on_the_way(job: Job, here: dict[str, str]) -> Measurement | None:
    """Acceptance in the evaluation of the speculator's weights; None if nothing was decoded."""
    assert job.trainer is not None
    figures = best_figures(job.trainer.state)
    if "acceptance_length" not in figures:
        return None
    row = CategoryAcceptance(
        category="held-out examples" if not job.named_prompts else "all",
        acceptance_length=figures["acceptance_length"],
        num_prompts=len(job.prompts),
    )
    contexts = counts_by_context(figures)
    return Measurement(
        rows=(row,),
        contexts=tuple(
            ContextAcceptance(
                context=name, num_drafts=num_drafts, accepted_per_position=tuple(kept)
            )
            for name, (num_drafts, *kept) in contexts.items()
        ),
        longest_context=max(map(len, job.prompts)) + job.plan.evaluation.max_tokens,
        command=f"speculators train --config {CONFIG}",
        versions=here,
        speculative_tokens=job.draft.config.proposal.speculative_tokens,
    )


def _data_facts(job: Job) -> DataFacts | None:
    if job.generation is not None:
        return DataFacts(datasets=job.generation.data.datasets)
    assert job.plan.data.store is not None
    try:
        return DataFacts.of_store(job.plan.data.store)
    except SpeculatorError as error:  # a store that was written without a plan
        logger.warning("left the data out of the model card: %s", error)
        return None


def check(speculator: Path, verifier: str) -> str | None:
    """The verdict of `speculators check`, in a separate process; None without vLLM."""
    if "check" not in COMMANDS.names() or find_spec("vllm") is None:
        logger.warning("did not check whether %s serves: vLLM is not installed", speculator)
        return None
    done = _command("check", str(speculator), "--verifier", verifier, "--json")
    try:
        report = CheckReport.model_validate_json(done.stdout)
    except ValidationError:
        return f"not checked: {_last_line(done)}"
    write_text(speculator.parent / CHECK, done.stdout)
    return report.verdict


def measure(speculator: Path, plan: TrainingPlan, prompts: Sequence[Prompt]) -> Measurement | None:
    """Acceptance by category over these prompts, by `speculators acceptance`; None without prompts.

    The prompts are written to ``run/prompts.jsonl``.
    """
    file, output = speculator.parent / PROMPTS, speculator.parent / MEASURED
    if not prompts or "acceptance" not in COMMANDS.names():
        return None
    lines = [prompt.model_dump_json(exclude_none=True) for prompt in prompts]
    write_text(file, "".join(f"{line}\n" for line in lines))
    options = ["--engine", "transformers", "--max-tokens", str(plan.evaluation.max_tokens)]
    if plan.evaluation.template_options:
        options += ["--template-options", json.dumps(plan.evaluation.template_options)]
    here = ["--prompts", str(file), "--verifier", plan.model.verifier, "--model", str(speculator)]
    done = _command("acceptance", *options, *here, "--output", str(output))
    if done.returncode:
        logger.warning("did not measure acceptance by category: %s", _last_line(done))
        return None
    report = AcceptanceReport.model_validate_json((output / "report.json").read_bytes())
    (draft,) = report.drafts
    (found,) = draft.by_k
    texts = (request.num_prompt_tokens + len(request.output_ids) for request in found.requests)
    named = plan.model.verifier_name or plan.model.verifier
    public = ["--prompts", PROMPTS, "--verifier", named if is_hub_id(named) else VERIFIER]
    return Measurement(
        rows=tuple(
            CategoryAcceptance(
                category=name,
                acceptance_length=counts.acceptance_length,
                num_prompts=counts.num_requests,
            )
            for name, counts in found.categories.items()
        ),
        contexts=tuple(
            ContextAcceptance(
                context=name,
                num_drafts=counts.num_drafts,
                accepted_per_position=tuple(counts.accepted_per_position),
            )
            for name, counts in found.contexts.items()
        ),
        longest_context=max(texts, default=0),
        command=shlex.join(["speculators", "acceptance", *options, *public, "--model", REPOSITORY]),
        versions=report.environment,
        speculative_tokens=found.speculative_tokens,
    )


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of `speculators` in a process outside torchrun's ranks."""
    command = [sys.executable, "-m", "speculators_core", *arguments]
    environment = environment_without_ranks()
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
