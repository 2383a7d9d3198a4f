"""Files and folders that survive crashes whole or absent."""

import errno
import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from speculators_core.errors import SpeculatorError, first_line


@dataclass(frozen=True)
class Roots:
    """Folders and files below which data may name other files; a root may itself be a link.

    Paths that the user gives may lie anywhere. This restricts paths from elsewhere: links inside a
    data set, files that its description lists, and paths in a server's responses.
    """

    places: tuple[Path, ...]
    option: str = "run.allowed_roots"
    """The option that sets them, for errors."""

    def with_own(self, place: Path) -> "Roots":
        """The same roots and a path that the user has named."""
        return replace(self, places=(*self.places, place))

    def check(self, path: str | Path) -> Path:
        """The absolute path with links resolved; the file need not exist.

        Open the returned path, not the given one: it is not affected by links that change later.

        Raises:
            SpeculatorError: it lies outside all roots.
        """
        found = in_full(path)
        roots = [in_full(place) for place in self.places]
        if any(found.is_relative_to(root) for root in roots):
            return found
        shown = f"{path}" if found == Path(path) else f"{path} (in full: {found})"
        raise SpeculatorError(
            f"{shown}, which the data name, is outside the allowed folders; expected it below "
            f"{', '.join(map(str, roots)) or 'none'}. Add its folder to {self.option} if you "
            "trust it."
        )


def in_full(path: str | Path) -> Path:
    """The absolute path with links resolved and ``~`` expanded.

    Raises:
        SpeculatorError: it has a loop of links or a zero byte, or there is no such home folder.
    """
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, ValueError, OSError) as error:
        raise SpeculatorError(
            f"{str(path)!r} is not a usable path: {first_line(error)}. Correct it."
        ) from error


def open_own(path: Path) -> IO[str]:
    """Opens a file for appending; a link is refused.

    Raises:
        OSError: it is a link, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    return open(os.open(path, flags, 0o644), "a", encoding="utf-8")


# ---- locks ----

LOCK = ".lock"


def try_lock(file: int) -> bool:
    """Locks an open file or folder until it is closed; False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Allows one run at a time in a folder, which is made if needed; None locks nothing.

    Raises:
        SpeculatorError: another run uses it, or the folder cannot be made.
    """
    if folder is None:
        yield
        return
    try:
        make_folder(folder)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise SpeculatorError(
            f"{folder} cannot be written: {first_line(error)}; expected a writable folder. Choose "
            "another one, or change its permissions."
        ) from error
    try:
        if not try_lock(file):
            raise SpeculatorError(
                f"{folder}: another run is writing there, expected one at a time. Wait until it "
                "ends, or choose another folder."
            )
        yield
    finally:
        os.close(file)


# ---- reading ----


def read_json(path: Path, expected: str = "a checkpoint") -> dict[str, Any]:
    """The JSON object in a file; ``expected`` names what its folder should be, for errors.

    Raises:
        SpeculatorError: the file is missing or is not a JSON object.
    """
    if path.exists() and not path.is_file():
        raise SpeculatorError(
            f"{path} is not a regular file; expected the JSON file of {expected}. Replace it."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpeculatorError(
            f"{path.parent} holds no {path.name}; expected {expected}. Correct the path, or copy "
            "the file there."
        ) from error
    except OSError as error:
        raise SpeculatorError(
            f"{path} cannot be read: {error.strerror}; expected the JSON file of {expected}. "
            "Check its permissions."
        ) from error
    except RecursionError as error:
        raise SpeculatorError(
            f"{path} is nested too deeply; expected the JSON file of {expected}. Copy it again."
        ) from error
    except ValueError as error:  # no JSON, no text, or a number of thousands of digits
        raise SpeculatorError(
            f"{path} is not valid JSON: {first_line(error)}; expected the JSON file of "
            f"{expected}. Correct it, or copy it again."
        ) from error
    if not isinstance(content, dict):
        raise SpeculatorError(
            f"{path} holds a {type(content).__name__}; expected a JSON object. Correct it, or "
            "copy it again."
        )
    return content


# ---- writing ----


@contextmanager
def replaced(path: Path, is_synced: bool = True) -> Iterator[Path]:
    """Yields a temporary path to write to; at the end the file is renamed to ``path``.

    After an error the temporary file is removed and ``path`` is unchanged. With ``is_synced`` both
    content and name are on disk at the end; without it, the caller has to `sync` later.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield temporary
        if is_synced:
            sync(temporary)
        os.replace(temporary, path)
        if is_synced:
            sync_names(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content.

    Raises:
        OSError: it cannot be written.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replaced_files(folder: Path, marker: str, stale: Collection[str] = ()) -> Iterator[Path]:
    """Yields an empty folder to fill; at the end its files replace their namesakes in ``folder``.

    Other files in ``folder`` are kept, except the ``stale`` ones. The ``marker`` is removed first
    and written last, since readers require it: at any time there are all old files, no marker, or
    all new files. After an error while the folder is filled, ``folder`` is unchanged.

    Raises:
        OSError: it cannot be written.
    """
    make_folder(folder)
    part = part_of(folder / marker)
    with filled(part):
        yield part
    names = sorted(path.name for path in part.iterdir())
    gone = [name for name in stale if name not in names]
    if names != [marker] or gone:
        (folder / marker).unlink(missing_ok=True)
        sync_names(folder)
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    place_files(part, folder, marker)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; at the end it replaces ``folder`` with all its content.

    After an error while it is filled, ``folder`` is unchanged. If the process is killed, the old
    folder, none, or the new one remains; the next call removes hidden leftovers beside it.

    Raises:
        OSError: it cannot be written.
    """
    make_folder(folder.parent)
    with filled(part_of(folder)) as part:
        yield part
    place_folder(part, folder)


def part_of(path: Path) -> Path:
    """The path of a file or folder while it is written."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def filled(part: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; at the end it is on disk, after an error removed."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for path in sorted(part.rglob("*")):
            if path.is_file():
                # safetensors lets the owner alone read.
                path.chmod(part.stat().st_mode & 0o666)
                sync(path)
            else:
                sync_names(path)
        sync_names(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def place_files(part: Path, folder: Path, marker: str) -> None:
    """Moves the files of a folder that is on disk to ``folder``, the ``marker`` last."""
    for path in sorted(part.iterdir()):
        if path.name != marker:
            os.replace(path, folder / path.name)
    sync_names(folder)
    os.replace(part / marker, folder / marker)
    part.rmdir()
    sync_names(folder)


def place_folder(part: Path, folder: Path) -> None:
    """Renames a folder that is on disk to ``folder``, replacing any folder of that name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir() and any(folder.iterdir()):
        os.replace(folder, old)
    os.replace(part, folder)
    sync_names(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents; their names are on disk afterwards.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_names(path.parent)


def check_writable(folder: Path) -> None:
    """Makes a folder, and a temporary file in it.

    Raises:
        OSError: one of them cannot be made.
    """
    make_folder(folder)
    with tempfile.TemporaryFile(dir=folder):
        pass


def sync(path: Path) -> None:
    """Returns once a file's content is on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_names(folder: Path) -> None:
    """Returns once the names in a folder are on disk, where the file system supports it."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
