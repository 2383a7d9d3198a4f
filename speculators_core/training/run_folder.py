"""The folder of a training run: whose it is, what made it, and whether it can be gone on with.

config.yaml       the plan in full, which reruns it
run.json          the plan, and each start: command, versions, machine, commit
checkpoint-500/   saved states, see `state_folder`
speculator/       the draft in the end
report.json       there when the run came to its end
"""

import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import JsonValue, ValidationError

from speculators_core.data_generation.preparation import locked, without_secrets
from speculators_core.data_generation.stores.disk import flat, write_text
from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.provenance import environment, sample_weights
from speculators_core.settings import Settings
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.state_folder import tidy

CONFIG = "config.yaml"
PROVENANCE = "run.json"
SPECULATOR = "speculator"
REPORT = "report.json"
FREE = frozenset(
    {
        "model.trust_remote_code",
        "data.num_workers",
        "data.queue_size",
        "run.output",
        "run.save_every",
        "run.keep",
        "run.log_every",
        "run.gradient_checkpointing",
        "run.compile",
        "run.fsdp",
        "run.check",
        "run.trackers",
        "run.license",
    }
)
"""Options that leave the draft as it is: a run may be gone on with under others."""
FOLDER_OR_ID = ("verifier", "start_from", "prompts")
"""Options that name something on this machine or on the hub."""
GIT_TIMEOUT_S = 10


class Commit(Settings):
    """Of the repository that a run was started in."""

    commit: str
    is_dirty: bool
    """Tracked files differ from it."""


class Start(Settings):
    """A start of the run, the first or a later one."""

    command: str
    started_at: str
    """ISO 8601, UTC."""
    environment: dict[str, str]
    """Versions and device."""
    git: Commit | None = None


class RunRecord(Settings):
    """What the folder says of its run."""

    format: Literal["speculators-run-1"] = "speculators-run-1"
    plan: dict[str, JsonValue]
    weights: dict[str, str | None]
    """Samples of the weights that it starts from, where they are on this machine."""
    starts: tuple[Start, ...] = ()


@dataclass(frozen=True)
class RunFolder:
    """A folder that is this process's until it is let go of."""

    path: Path
    is_resumed: bool
    """The run had been started before."""

    @property
    def speculator(self) -> Path:
        return self.path / SPECULATOR

    @property
    def report(self) -> Path:
        return self.path / REPORT

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end: nothing is left to do."""
        return self.speculator.is_dir() and self.report.is_file()


def check_folder(plan: TrainingPlan) -> None:
    """Looks whether ``run.output`` is free, or holds this run; nothing is written.

    Raises:
        SpeculatorError: it holds a run of another plan, or something that is no run.
    """
    folder = plan.run.output.expanduser().resolve()
    if (folder / PROVENANCE).exists():
        _check_same(folder, _read_record(folder), _record_of(plan))
    elif folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if others:
            raise SpeculatorError(
                f"{folder} holds {others[0]} and no run. Name another run.output, or empty it."
            )


@contextmanager
def claim(plan: TrainingPlan, command: Sequence[str]) -> Iterator[RunFolder]:
    """The folder ``run.output``, taken for this plan or gone on with; one process at a time.

    A new or empty folder is taken. What a killed process left half-written is tidied up. A finished
    run is left as it is. ``command`` is written down, without its secrets.

    Raises:
        SpeculatorError: another process has it, it holds a run of another plan or no run at all,
            or it cannot be written.
    """
    folder = plan.run.output.expanduser().resolve()
    check_folder(plan)
    with locked(folder):
        check_folder(plan)  # somebody may have moved in meanwhile
        try:
            claimed = _enter(folder, plan, command)
        except OSError as error:
            raise SpeculatorError(f"{folder} cannot be written: {first_line(error)}.") from error
        yield claimed


def in_full(plan: TrainingPlan) -> TrainingPlan:
    """The plan with its local places in full, so that it says the same in every directory."""
    sections = {}
    for name, section in plan:
        places = {
            key: _located(value)
            for key, value in section
            if isinstance(value, Path)
            or (key in FOLDER_OR_ID and value and Path(value).expanduser().exists())
        }
        sections[name] = section.model_copy(update=places)
    return plan.model_copy(update=sections)


def _located(place: Path | str) -> Path | str:
    return type(place)(Path(place).expanduser().resolve())


def _enter(folder: Path, plan: TrainingPlan, command: Sequence[str]) -> RunFolder:
    claimed = RunFolder(folder, is_resumed=(folder / PROVENANCE).exists())
    if claimed.is_finished:
        return claimed
    record = _read_record(folder) if claimed.is_resumed else _record_of(plan)
    record = record.model_copy(update={"starts": (*record.starts, _this_start(command))})
    write_text(folder / PROVENANCE, record.model_dump_json(indent=2))
    if not (folder / CONFIG).exists():
        write_text(folder / CONFIG, yaml.safe_dump(record.plan, sort_keys=False))
    tidy(folder)
    return claimed


def _record_of(plan: TrainingPlan) -> RunRecord:
    plan = in_full(plan)
    sources = {"model.verifier": plan.model.verifier, "model.start_from": plan.model.start_from}
    weights = {key: source and sample_weights(source) for key, source in sources.items()}
    return RunRecord(plan=plan.model_dump(mode="json"), weights=weights)


def _read_record(folder: Path) -> RunRecord:
    path = folder / PROVENANCE
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise SpeculatorError(
            f"{path} is not of a training run, or damaged: {first_fault(error)}. Name another "
            "run.output."
        ) from error


def _check_same(folder: Path, found: RunRecord, now: RunRecord) -> None:
    """Raises SpeculatorError unless both records lead to the same draft."""
    before, after = _deciding(found, folder / PROVENANCE), _deciding(now, folder / PROVENANCE)
    for key in dict.fromkeys([*after, *before]):
        if before.get(key) != after.get(key):
            raise SpeculatorError(
                f"{folder} holds a run with {key} {before.get(key)!r:.80}, now it is "
                f"{after.get(key)!r:.80}. Run with the same, or name another run.output."
            )


def _deciding(record: RunRecord, where: Path) -> dict[str, Any]:
    """What decides the draft, by full names; options that the record lacks have their defaults."""
    plan = TrainingPlan.read(record.plan, str(where)).model_dump(mode="json")
    options = {key: value for key, value in flat(plan).items() if key not in FREE}
    return {**options, **{f"weights of {key}": value for key, value in record.weights.items()}}


def _this_start(command: Sequence[str]) -> Start:
    return Start(
        command=shlex.join(without_secrets(command)),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment(),
        git=_commit_here(),
    )


def _commit_here() -> Commit | None:
    """Of the current directory; None where there is no repository, or no git."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return Commit(commit=commit, is_dirty=bool(changes))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
