"""A run's folder: plan, starts, lock.

config.yaml       the plan in full, which reruns it
run.json          the plan, and each start: command, versions, machine, commit
checkpoint-500/   saved states, see `state_folder`
speculator/       the draft at the end
prompts.jsonl     prompts of evaluation.prompts that were decoded at the end
report.json       present when the run has come to its end
"""

import logging
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, JsonValue, ValidationError
from xxhash import xxh3_64

from speculators_core.data_generation.runs.preparation import decides_bytes
from speculators_core.data_generation.stores.disk import MANIFEST as STORE_MANIFEST
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.files import LOCK, locked, write_text
from speculators_core.provenance import environment, sample_weights, without_secrets
from speculators_core.settings import Settings, flat
from speculators_core.training.ranks import world_size
from speculators_core.training.rows.opening import generation_of
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.states.state_folder import MANIFEST, step_of, tidy

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
PROVENANCE = "run.json"
SPECULATOR = "speculator"
REPORT = "report.json"
CHANGEABLE_ON_RESUME = frozenset(
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
        "run.deepspeed",
        "run.check",
        "run.trackers",
        "run.license",
    }
)
"""Options that do not affect the draft: a run may be resumed with other values."""
FOLDER_OR_ID = ("verifier", "start_from", "prompts")
"""Options that name something on this machine or on the hub."""
GIT_TIMEOUT_S = 10


class Commit(Settings):
    """The git commit of the directory that a run was started in."""

    commit: str
    is_dirty: bool
    """Whether tracked files differ from it."""


class Start(Settings):
    """One start of the run, the first or a later one."""

    command: str
    started_at: str
    """ISO 8601, UTC."""
    environment: dict[str, str]
    """Versions and device."""
    git: Commit | None = None


class RunRecord(Settings):
    """The record of a run in its folder."""

    format: Literal["speculators-run-1"] = "speculators-run-1"
    plan: dict[str, JsonValue]
    weights: dict[str, str | None]
    """Hashes of samples of the weights that it starts from, where they are on this machine."""
    rows_per_step: int = Field(ge=1)
    """Rows of one step, of all processes."""
    content: dict[str, JsonValue]
    """Hashes of data and prompts on this machine, and the options that data are made with."""
    starts: tuple[Start, ...] = ()


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run while this process holds its lock."""

    path: Path
    plan: TrainingPlan
    is_resumed: bool
    """Whether there is a run of the same plan to resume."""

    def start(self, command: Sequence[str]) -> None:
        """Records this start, with ``command`` without its secrets, and tidies up.

        Files that a killed process left half-written are completed or removed.

        Raises:
            SpeculatorError: the folder cannot be written.
        """
        try:
            self._enter(command)
        except OSError as error:
            raise SpeculatorError(f"{self.path} cannot be written: {first_line(error)}.") from error

    def _enter(self, command: Sequence[str]) -> None:
        if not self.is_resumed and (self.path / PROVENANCE).exists():
            logger.info("replaced a run of another plan in %s, which had saved nothing", self.path)
        record = _read_record(self.path) if self.is_resumed else _record_of(self.plan)
        record = record.model_copy(update={"starts": (*record.starts, _this_start(command))})
        if not self.is_resumed:
            (self.path / CONFIG).unlink(missing_ok=True)
        write_text(self.path / PROVENANCE, record.model_dump_json(indent=2))
        if not (self.path / CONFIG).exists():
            write_text(self.path / CONFIG, yaml.safe_dump(record.plan, sort_keys=False))
        (self.path / REPORT).unlink(missing_ok=True)  # of a speculator that is gone
        tidy(self.path)


def is_finished(plan: TrainingPlan) -> bool:
    """Whether the run has come to its end: its speculator and its report exist."""
    folder = _folder_of(plan)
    return (folder / SPECULATOR).is_dir() and (folder / REPORT).is_file()


def check_folder(plan: TrainingPlan) -> bool:
    """Checks that ``run.output`` is free, or holds this run; nothing is written.

    The folder of a run of another plan is free too, if that has saved nothing yet. Returns whether
    there is a run of this plan to resume.

    Raises:
        SpeculatorError: it holds a run of another plan, or something other than a run.
    """
    folder = _folder_of(plan)
    if not (folder / PROVENANCE).exists():
        _check_free(folder)
        return False
    difference = _difference(folder, _read_record(folder), _record_of(plan))
    if difference is not None and _has_saved(folder):
        raise SpeculatorError(
            f"{folder} holds a run with {difference}. Use the same options to resume that run, or "
            "choose another run.output."
        )
    return difference is None


@contextmanager
def claim(plan: TrainingPlan) -> Iterator[RunFolder]:
    """The folder ``run.output``, locked for this plan; one process at a time.

    Until `RunFolder.start` nothing but a lock is written; without a start, a folder that was made
    for the lock is removed again.

    Raises:
        SpeculatorError: another process has the lock, the folder holds a run of another plan or
            something other than a run, or it cannot be written.
    """
    folder = _folder_of(plan)
    if not (folder / PROVENANCE).exists():
        _check_free(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with locked(folder):
        try:
            yield RunFolder(folder, plan, is_resumed=check_folder(plan))
        finally:
            if made and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                with suppress(OSError):  # another process has written there
                    for path in made:
                        path.rmdir()


def _folder_of(plan: TrainingPlan) -> Path:
    return plan.run.output.expanduser().resolve()


def _check_free(folder: Path) -> None:
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in others if not name.startswith(".")]
    if others:
        raise SpeculatorError(
            f"{folder} holds {others[0]} and not a run; expected a run, or an empty folder. Choose "
            "another run.output, or empty it."
        )


def _has_saved(folder: Path) -> bool:
    """Whether a run has left a state or a speculator."""
    return (folder / SPECULATOR).exists() or newest_whole_state(folder) is not None


def newest_whole_state(folder: Path) -> Path | None:
    """The state of the latest step that is whole, though its files may have been damaged since."""
    states = {path: step_of(path) for path in folder.glob("checkpoint-*")}
    whole = [(step, path) for path, step in states.items() if step and (path / MANIFEST).exists()]
    return max(whole, default=(0, None))[1]


def in_full(plan: TrainingPlan) -> TrainingPlan:
    """The plan with absolute local paths, so that it is the same in every directory."""
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


def _record_of(plan: TrainingPlan) -> RunRecord:
    plan = in_full(plan)
    sources = {"model.verifier": plan.model.verifier, "model.start_from": plan.model.start_from}
    return RunRecord(
        plan=plan.model_dump(mode="json"),
        weights={key: source and sample_weights(source) for key, source in sources.items()},
        rows_per_step=plan.optimizer.rows_per_step * world_size(),
        content=_content_of(plan),
    )


def _content_of(plan: TrainingPlan) -> dict[str, JsonValue]:
    """What decides the rows and prompts, by name; files that are not on this machine have None."""
    data, found = plan.data, dict[str, JsonValue]()
    files = [] if plan.evaluation.prompts is None else [plan.evaluation.prompts]
    generation = generation_of(plan)
    if generation is None:
        assert data.store is not None
        found["content of data.store"] = hash_store(data.store)
    else:
        options = flat(decides_bytes(generation))
        found |= {f"{key} of data.{data.kind}": value for key, value in options.items()}
        files += [dataset.path for dataset in generation.data.datasets]
    return found | {f"content of {name}": hash_local(Path(name)) for name in files}


def hash_store(folder: Path) -> str | None:
    """Hash of the checksums of all examples; None where there is no store."""
    if not (folder / STORE_MANIFEST).exists():
        return None
    digest = xxh3_64()
    for _, header in DiskStore.open(folder).headers():
        for entry in header.entries:
            digest.update(f"{entry.key} {entry.checksum} ".encode())
    return digest.hexdigest()


def hash_local(path: Path) -> str | None:
    """Hash of a file, or of all files of a folder; None where there is neither."""
    path = path.expanduser()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    if not files:
        return None
    digest = sha256()
    for file in files:
        with file.open("rb") as content:
            checksum = file_digest(content, sha256).hexdigest()
        digest.update(f"{file.relative_to(path)} {checksum} ".encode())
    return digest.hexdigest()


def _read_record(folder: Path) -> RunRecord:
    path = folder / PROVENANCE
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise SpeculatorError(
            f"{path} is not the record of a training run, or is damaged: {first_fault(error)}. "
            "Choose another run.output."
        ) from error


def _difference(folder: Path, found: RunRecord, now: RunRecord) -> str | None:
    """The first difference that leads to different drafts; None where there is none."""
    before, after = (_deciding(record, folder / PROVENANCE) for record in (found, now))
    for key in dict.fromkeys([*after, *before]):
        if before.get(key) != after.get(key):
            return f"{key} {before.get(key)!r:.80}, now it is {after.get(key)!r:.80}"
    return None


def _deciding(record: RunRecord, where: Path) -> dict[str, JsonValue]:
    """What decides the draft, by full name; options that the record lacks have their defaults."""
    plan = TrainingPlan.read(record.plan, str(where)).model_dump(mode="json")
    options = {key: value for key, value in flat(plan).items() if key not in CHANGEABLE_ON_RESUME}
    del options["optimizer.rows_per_step"]  # another number of processes has another one
    return {
        **options,
        "optimizer.rows_per_step of all processes": record.rows_per_step,
        **{f"weights of {key}": value for key, value in record.weights.items()},
        **record.content,
    }


def _this_start(command: Sequence[str]) -> Start:
    return Start(
        command=shlex.join(without_secrets(command)),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment(),
        git=_commit_here(),
    )


def _commit_here() -> Commit | None:
    """The commit of the current directory; None where there is no repository, or no git."""
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
