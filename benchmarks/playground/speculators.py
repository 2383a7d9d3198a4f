"""Builds the playground's speculators with two commands.

Their plans are in this folder. `speculators generate-data` has the verifier continue beginnings of
the library's text greedily, since a draft will see what the verifier writes. `speculators train`
learns from these texts. Both resume an earlier run of the same plans.
"""

import os
import random
import shutil
from pathlib import Path

from datasets import Dataset

from benchmarks.playground.corpus import write_lines
from speculators_core.commands.train import STOPPED_EXIT
from speculators_core.data_generation.runs.generate import generate_data
from speculators_core.data_generation.settings import read_plan
from speculators_core.files import replaced_folder
from speculators_core.training.settings import read_training_plan
from speculators_core.training.states.run_folder import CONFIG, PROVENANCE
from speculators_core.training.train import train

PLANS = Path(__file__).parent
SEED = 0
NUM_BEGINNINGS = 12_288
BEGINNING_LENGTH = 64
BEGINNINGS, STATES = "beginnings.jsonl", "states"


def make_states(rows: Dataset, verifier: Path, work: Path) -> None:
    """Writes continuations of beginnings of ``rows``, with the verifier's states, to ``work``."""
    beginnings = work / BEGINNINGS
    work.mkdir(parents=True, exist_ok=True)
    write_lines(_beginnings(rows), beginnings)
    plan = read_plan(PLANS / "answers.yaml")
    (source,) = plan.data.datasets
    source = source.model_copy(update={"path": str(beginnings)})
    data = plan.data.model_copy(
        update={"verifier": os.path.relpath(verifier), "datasets": (source,)}
    )
    sync = plan.sync.model_copy(update={"path": work / STATES})
    generate_data(plan.model_copy(update={"data": data, "sync": sync}))


def _beginnings(rows: Dataset) -> list[dict[str, list[int]]]:
    """Stretches of the rows; nothing of them is learnt."""
    generator = random.Random(SEED)
    found = []
    for _ in range(NUM_BEGINNINGS):
        ids = rows[generator.randrange(len(rows))]["input_ids"]
        start = generator.randrange(len(ids) - BEGINNING_LENGTH)
        ids = ids[start : start + BEGINNING_LENGTH]
        found.append({"input_ids": ids, "loss_mask": [0] * len(ids)})
    return found


def train_speculator(name: str, verifier: Path, work: Path, folder: Path) -> None:
    """Trains a draft by its plan and copies it to ``folder``, without the run's own papers.

    The checkpoint names its verifier by the relative folder, so both move together.
    """
    plan = read_training_plan(PLANS / f"{name}.yaml")
    model = plan.model.model_copy(update={"verifier": os.path.relpath(verifier)})
    data = plan.data.model_copy(update={"store": work / STATES})
    run = plan.run.model_copy(update={"output": work / name})
    report = train(plan.model_copy(update={"model": model, "data": data, "run": run}))
    if report.speculator is None:
        raise SystemExit(STOPPED_EXIT)
    papers = shutil.ignore_patterns(CONFIG, PROVENANCE)
    with replaced_folder(folder) as part:
        shutil.copytree(report.speculator, part, ignore=papers, dirs_exist_ok=True)
