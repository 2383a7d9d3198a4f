"""Files that appear whole and survive a power cut, and where they may lie."""

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from speculators_core.errors import SpeculatorError, first_line


@dataclass(frozen=True)
class Roots:
    """The folders below which everything local lies; a root may itself be a link."""

    folders: tuple[Path, ...]

    def check(self, path: str | Path) -> Path:
        """The path in full, its links followed; its end need not exist.

        Open what is returned, not what was given: a link that is changed later has no effect then.

        Raises:
            SpeculatorError: it lies outside all roots.
        """
        found = _follow(path)
        roots = [_follow(folder) for folder in self.folders]
        if any(found.is_relative_to(root) for root in roots):
            return found
        shown = f"{path}" if found == Path(path) else f"{path} (in full: {found})"
        raise SpeculatorError(
            f"{shown} lies outside of what may be read and written: "
            f"{', '.join(map(str, roots)) or 'nothing'}. Add its folder to `run.allowed_roots`."
        )


def _follow(path: str | Path) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, ValueError, OSError) as error:  # a loop, no home, a zero byte
        raise SpeculatorError(f"{path!r} is no usable path: {first_line(error)}.") from error


def open_own(path: Path) -> IO[str]:
    """A file of ours to append to; one that is a link is not followed.

    Raises:
        OSError: it is one, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    return open(os.open(path, flags, 0o644), "a", encoding="utf-8")


LOCK = ".lock"


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """One run at a time in a folder; the lock goes with the process.

    Raises:
        SpeculatorError: another run has it, or the folder cannot be made.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise SpeculatorError(f"{folder} cannot be written: {first_line(error)}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise SpeculatorError(f"{folder}: another run is writing there.") from error
    finally:
        os.close(file)


@contextmanager
def replaced(path: Path, is_synced: bool = True) -> Iterator[Path]:
    """A temporary name to write to; what lies there in the end has ``path`` as its name.

    Where there was an error nothing of it is left, and what had that name before still has. With
    ``is_synced`` bytes and name are on disk in the end; without it `sync` is another's to call.

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
    """Raises:
    OSError: it cannot be written.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Returns when the bytes of a file are on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_names(folder: Path) -> None:
    """Returns when the names in a folder are on disk, where its file system can say so."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
