"""The end of a run: the speculator, its papers, and whether it serves."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from speculators_core.checkpoint import as_dtype
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.data_generation.stores.disk import write_text
from speculators_core.errors import SpeculatorError
from speculators_core.model import SpeculatorModel
from speculators_core.provenance import environment
from speculators_core.registry import COMMANDS
from speculators_core.settings import read_sections
from speculators_core.training.card import REPOSITORY, write_card
from speculators_core.training.card_facts import (
    CardFacts,
    CategoryAcceptance,
    DataFacts,
    Measurement,
    TrainingFacts,
)
from speculators_core.training.job import LOG, Job
from speculators_core.training.run_folder import CONFIG, PROVENANCE, SPECULATOR
from speculators_core.training.settings import TrainingPlan

logger = logging.getLogger(__name__)

CHECK = "check.json"
MEASURED = "acceptance"


def write_speculator(job: Job, draft: SpeculatorModel) -> Path:
    """Writes ``run/speculator``, whole or not at all: checkpoint, card, and the run's papers."""
    run = job.plan.run.output
    target, part = run / SPECULATOR, run / f".{SPECULATOR}.part"
    old = run / f".{SPECULATOR}.old"  # of a start that was killed before its report
    for folder in (part, old):
        shutil.rmtree(folder, ignore_errors=True)
    draft.to("cpu", as_dtype(job.plan.run.saved_dtype)).save_pretrained(part)
    for name in (CONFIG, PROVENANCE, LOG):
        if (run / name).exists():
            shutil.copyfile(run / name, part / name)
    write_card(part, card_facts(job))
    if target.exists():
        os.replace(target, old)
    os.replace(part, target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def card_facts(job: Job, measured: Measurement | None = None) -> CardFacts:
    """What the model card says of the run."""
    plan = job.plan
    assert job.trainer is not None
    state = job.trainer.state
    return CardFacts(
        license=plan.run.license,
        data=_data_facts(job),
        training=TrainingFacts(
            num_steps=state.global_step,
            num_tokens=state.global_step * job.rows_per_step * plan.data.row_length,
            optimizer=plan.optimizer.optimizer,
            learning_rate=plan.optimizer.learning_rate,
            row_length=plan.data.row_length,
            schedule=plan.optimizer.schedule,
            started_from=plan.model.start_from,
            hardware=environment()["device"],
        ),
        measured=measured,
        versions=environment(),
    )


def _data_facts(job: Job) -> DataFacts | None:
    data = job.plan.data
    try:
        if data.store is not None:
            return DataFacts.of_store(data.store)
    except SpeculatorError as error:  # a store that somebody wrote without a plan
        logger.warning("the model card says nothing of the data: %s", error)
        return None
    file = data.texts or data.online or data.queue
    assert file is not None
    sections = read_sections(file, GenerationPlan, {})
    return DataFacts(datasets=sections["data"]["datasets"])


def check(speculator: Path) -> str | None:
    """What `speculators check` says of it, in a process of its own; None without vLLM."""
    if "check" not in COMMANDS.names() or find_spec("vllm") is None:
        logger.warning("vLLM is not installed: whether %s serves was not checked", speculator)
        return None
    done = _command("check", str(speculator), "--json")
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return f"not checked: {_last_line(done)}"
    write_text(speculator.parent / CHECK, done.stdout)
    faults = [fault["cause"] for fault in report["findings"] if fault["severity"] == "fault"]
    return f"not fit to serve: {', '.join(map(str, faults))}" if faults else "fit to serve"


def measure(speculator: Path, plan: TrainingPlan) -> Measurement | None:
    """Acceptance by category over ``evaluation.prompts``, by `speculators acceptance`.

    None where the plan names no prompts or decodes none.
    """
    section, output = plan.evaluation, speculator.parent / MEASURED
    if section.prompts is None or not section.decode or "acceptance" not in COMMANDS.names():
        return None
    options = [
        *("--engine", "transformers", "--prompts", section.prompts),
        *("--verifier", plan.model.verifier, "--max-tokens", str(section.max_tokens)),
    ]
    done = _command("acceptance", *options, "--model", str(speculator), "--output", str(output))
    if done.returncode:
        logger.warning("acceptance was not measured by category: %s", _last_line(done))
        return None
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    found = report["drafts"][0]["by_k"][0]
    return Measurement(
        rows=tuple(
            CategoryAcceptance(
                category=name,
                acceptance_length=counts["acceptance_length"],
                num_prompts=counts["num_requests"],
            )
            for name, counts in found["categories"].items()
        ),
        command=shlex.join(["speculators", "acceptance", *options, "--model", REPOSITORY]),
        versions=report["environment"],
        speculative_tokens=found["speculative_tokens"],
    )


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of ours in a process that belongs to no torchrun."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "speculators_core", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=kept)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
