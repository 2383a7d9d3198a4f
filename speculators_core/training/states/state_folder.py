"""Folders of saved training states, whole or absent.

    run/checkpoint-500/           a complete state
          weights.safetensors ...
          manifest.json           sizes and checksums of the files above
    run/.checkpoint-600.part/     a state being written, or left by a killed process

A state is written as `.checkpoint-600.part`, its manifest last, and then renamed. Removal is the
reverse: the manifest is first renamed to `.unfinished`, then the files are deleted. A folder with
a manifest is therefore complete, and a partial one is recognised. Other files in these folders are
left alone.
"""

import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_64

from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.files import (
    filled,
    make_folder,
    part_of,
    place_files,
    place_folder,
    sync,
    sync_names,
    write_text,
)
from speculators_core.settings import Settings

logger = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
OPTIMIZER_GROUPS = "optimizer.json"
SCHEDULER = "scheduler.json"
TRAINER_STATE = "trainer_state.json"
RNG = "rng.safetensors"
FILES = (WEIGHTS, OPTIMIZER, OPTIMIZER_GROUPS, SCHEDULER, TRAINER_STATE, RNG)
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
"""The manifest's name while a state is being removed."""
FORMAT = "speculators-state-1"
FOLDER_NAME = re.compile(r"checkpoint-(\d{1,12})|\.checkpoint-(\d{1,12})\.part")

Content = Mapping[str, Tensor] | str
"""Content of a file: tensors by name, or text."""


class FileRecord(Settings):
    """Expected size and checksum of a file."""

    size_bytes: int = Field(ge=0)
    checksum: str
    """64-bit XXH3 of the file."""


class Manifest(Settings):
    """Files of a complete state."""

    format: Literal["speculators-state-1"] = "speculators-state-1"
    step: int = Field(ge=0)
    serial: int = Field(ge=1)
    """Orders the states of a run by time of writing; a damaged state's step is written again."""
    files: dict[str, FileRecord]
    checksum: str = ""
    """64-bit XXH3 of the fields above as JSON."""

    @model_validator(mode="after")
    def _lists_our_files(self) -> "Manifest":
        if set(self.files) != set(FILES):
            raise ValueError(f"files must be {', '.join(FILES)}")
        return self

    @property
    def expected_checksum(self) -> str:
        return xxh3_64(self.model_dump_json(exclude={"checksum"}).encode()).hexdigest()


def step_of(folder: Path) -> int | None:
    """The step in a state folder's name; None if it is not the name of a state."""
    match = FOLDER_NAME.fullmatch(folder.name)
    return None if match is None else int(match[1] or match[2])


# ---- looking ----


def read_manifest(folder: Path) -> Manifest:
    """Reads a state's manifest.

    Raises:
        SpeculatorError: it is missing, damaged, or states another step.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise SpeculatorError(
            f"{folder} holds no {MANIFEST}; expected a complete saved state. Resume from another "
            "state."
        ) from error
    except OSError as error:
        raise SpeculatorError(
            f"{path} cannot be read: {first_line(error)}; expected the manifest of a state. Check "
            "its permissions, or resume from another state."
        ) from error
    except ValidationError as error:
        raise _damaged(path, first_fault(error)) from error
    if manifest.checksum != manifest.expected_checksum:
        raise _damaged(path, "its checksum does not match")
    if step_of(folder) not in (None, manifest.step):
        raise _damaged(path, f"it states step {manifest.step}, expected {step_of(folder)}")
    return manifest


def check_state(folder: Path) -> None:
    """Reads every byte of a state.

    Raises:
        SpeculatorError: a file is missing, truncated or changed; the first is named.
    """
    for name in read_manifest(folder).files:
        check_file(folder, name)


def check_file(folder: Path, name: str) -> Path:
    """The path of a state's file, after comparing its bytes with the manifest.

    Raises:
        SpeculatorError: it is missing, truncated or changed, or the manifest is.
    """
    path, expected = folder / name, read_manifest(folder).files[name]
    try:
        found = _record(path)
    except OSError as error:
        raise _damaged(path, error.strerror or first_line(error)) from error
    if found.size_bytes != expected.size_bytes:
        raise _damaged(path, f"it has {found.size_bytes} bytes, expected {expected.size_bytes}")
    if found != expected:
        raise _damaged(path, "its checksum does not match")
    return path


def newest_state(run: Path) -> Path | None:
    """The complete state written last; damaged ones are skipped with a warning."""
    for folder in _in_order(run):
        try:
            check_state(folder)
        except SpeculatorError as error:
            logger.warning("skipped %s: %s", folder.name, error)
        else:
            return folder
    return None


def _state_folders(run: Path) -> Iterator[Path]:
    for folder in sorted(run.glob("checkpoint-*")):
        if step_of(folder) is not None and folder.is_dir() and not folder.is_symlink():
            yield folder


def _in_order(run: Path) -> list[Path]:
    """Folders with a manifest, newest first; those with a damaged one come before all others."""
    found = [folder for folder in _state_folders(run) if (folder / MANIFEST).exists()]
    return sorted(found, key=lambda folder: _serial_of(folder) or math.inf, reverse=True)


def _serial_of(folder: Path) -> int:
    """The state's serial; 0 where its manifest is damaged or of another format."""
    try:
        return read_manifest(folder).serial
    except SpeculatorError:
        return 0


def _has_its_sizes(folder: Path) -> bool:
    files = read_manifest(folder).files
    try:
        return all(
            (folder / name).stat().st_size == record.size_bytes for name, record in files.items()
        )
    except OSError:
        return False


def _record(path: Path) -> FileRecord:
    digest, size_bytes = xxh3_64(), 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            size_bytes += len(chunk)
    return FileRecord(size_bytes=size_bytes, checksum=digest.hexdigest())


def _damaged(path: Path, what: str) -> SpeculatorError:
    return SpeculatorError(
        f"{path} is damaged: {what}; expected the bytes that training wrote. Copy it again, or "
        "resume from another state."
    )


# ---- writing; by one process of a run at a time ----


def write_whole(folder: Path, contents: Mapping[str, Content]) -> None:
    """Writes ``run/checkpoint-<step>`` with all `FILES`; it is on disk afterwards.

    A state of the same step is replaced; foreign files in its folder are kept.

    Raises:
        ValueError: the folder's name or the set of files is not that of a state.
        SpeculatorError: a foreign file has the name of one of the files.
        OSError, SafetensorError: there is no room, or no permission to write.
    """
    step = step_of(folder)
    if step is None or folder.name.startswith(".") or set(contents) != set(FILES):
        raise ValueError(f"expected checkpoint-<step> and {FILES}, found {folder}, {[*contents]}")
    run = folder.parent
    make_folder(run)
    tidy(run)
    serial = 1 + max(map(_serial_of, _in_order(run)), default=0)
    with filled(part_of(folder)) as part:
        for name, content in contents.items():
            if isinstance(content, str):
                (part / name).write_text(content, encoding="utf-8")
            else:
                save_file(dict(content), part / name, {"format": "pt"})
            sync(part / name)  # before there is a manifest
        _write_manifest(part, step, serial)
    _put_in_place(part)


def _write_manifest(folder: Path, step: int, serial: int) -> None:
    files = {name: _record(folder / name) for name in FILES}
    manifest = Manifest(step=step, serial=serial, files=files)
    manifest = manifest.model_copy(update={"checksum": manifest.expected_checksum})
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=1))


def rotate_states(run: Path, keep: int, best_step: int | None = None) -> None:
    """Removes all states but the last ``keep`` and the best one.

    Incomplete states do not count. Foreign files are kept, and so are the folders they are in.

    Raises:
        ValueError: ``keep`` is less than 1.
        SpeculatorError: as `tidy`.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, found {keep}")
    tidy(run)
    states = [folder for folder in _in_order(run) if _serial_of(folder)]
    counted = [folder for folder in states if _has_its_sizes(folder)]
    if len(counted) <= keep:
        return
    for folder in states[states.index(counted[keep - 1]) + 1 :]:
        if step_of(folder) != best_step:
            _take_apart(folder)


def tidy(run: Path) -> None:
    """Finishes what a killed process began: renames complete states, removes partial ones.

    Raises:
        SpeculatorError: a foreign file is in the way of a complete state.
    """
    for part in sorted(run.glob(".checkpoint-*.part")):
        if step_of(part) is None or not part.is_dir() or part.is_symlink():
            continue
        if _serial_of(part):
            _put_in_place(part)
        else:
            shutil.rmtree(part)
    for folder in _state_folders(run):
        if (folder / UNFINISHED).exists():
            _take_apart(folder)


def _put_in_place(part: Path) -> None:
    """Renames a complete state, replacing one of the same step."""
    folder = part.with_name(part.name.removeprefix(".").removesuffix(".part"))
    if _is_ours(folder):
        _take_apart(folder)
    if folder.is_dir() and any(folder.iterdir()):
        _fill(folder, part)
    else:
        place_folder(part, folder)


def _fill(folder: Path, part: Path) -> None:
    """Moves a state into a folder with foreign files, or finishes an interrupted move."""
    for name in sorted(path.name for path in part.iterdir()):
        if (folder / name).exists():
            raise SpeculatorError(
                f"{folder / name} belongs to no state of this run; expected that name to be free "
                "for a saved state. Move the file away, then run the same command again."
            )
    place_files(part, folder, MANIFEST)


def _is_ours(folder: Path) -> bool:
    """Whether the folder has a state's manifest, even a damaged one."""
    try:
        return (folder / UNFINISHED).exists() or FORMAT.encode() in (folder / MANIFEST).read_bytes()
    except OSError:
        return False


def _take_apart(folder: Path) -> None:
    """Removes a state's files, and the folder if nothing else is in it."""
    if (folder / MANIFEST).exists():
        os.replace(folder / MANIFEST, folder / UNFINISHED)
        sync_names(folder)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / UNFINISHED).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
