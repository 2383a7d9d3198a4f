"""Files that appear whole, and stay whole where the power fails.

A rename alone may reach the disk before the bytes that it names. So those are brought there first,
and the folder with the new name after it.
"""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
