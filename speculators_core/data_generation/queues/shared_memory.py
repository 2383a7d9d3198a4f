"""Shared-memory files and the private folders that hold them.

    file   | ticket, 8 bytes | ... | tensor | tensor | ...      each from a multiple of `ALIGNMENT`

One process writes a file and others read it. A file holds one example, and is reused once that one
is acknowledged. The ticket changes first, so a reader that was considered lost can detect that its
example has been replaced.
"""

import errno
import logging
import mmap
import os
import re
import secrets
import shutil
import stat
import struct
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from speculators_core.data_generation.examples import Schema
from speculators_core.data_generation.queues.frames import (
    FrameError,
    SharedFile,
    row_bytes,
    tensor_of,
)
from speculators_core.errors import SpeculatorError
from speculators_core.files import try_lock

logger = logging.getLogger(__name__)

PREFIX = "speculators-queue-"
TICKET = struct.Struct("=Q")
ALIGNMENT = 64
SMALLEST_FILE = 2**16


def places() -> list[Path]:
    """Folders for private folders: in memory, then on the disk of temporary files."""
    found = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    return [place for place in found if place.is_dir() and os.access(place, os.W_OK)]


class PrivateFolder:
    """A folder for this user only (0700), locked while its process lives.

    Other processes remove the folder of a killed one.
    """

    def __init__(self, place: Path) -> None:
        hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=place))
        self._lock: int | None = os.open(hidden, os.O_RDONLY)
        try_lock(self._lock)
        self.path = place / f"{PREFIX}{secrets.token_hex(8)}"
        hidden.rename(self.path)  # seen by others only when it is locked

    def remove(self) -> None:
        """Removes the folder; a second call has no effect."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def sweep() -> None:
    """Removes folders that killed processes of this user left."""
    for place in places():
        for folder in place.glob(f"{PREFIX}*"):
            if is_private(folder):
                _remove_if_left(folder)


def is_private(folder: Path) -> bool:
    """Whether `PrivateFolder` made this folder, for this user."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return (
        re.fullmatch(PREFIX + "[0-9a-f]{16}", folder.name) is not None
        and stat.S_ISDIR(found.st_mode)
        and stat.S_IMODE(found.st_mode) == 0o700
        and found.st_uid == os.getuid()
    )


def _remove_if_left(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # another process removed it
    try:
        if try_lock(lock):  # its owner is gone
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


class WrittenFile:
    """A file of the producer."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        """Raises:
        OSError: there is no room.
        """
        self.path = folder / secrets.token_hex(8)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, size_bytes)  # a full tmpfs shows here, not as SIGBUS
            self.memory = mmap.mmap(handle, size_bytes)
        except OSError:
            self.path.unlink()
            raise
        finally:
            os.close(handle)
        self.size_bytes = size_bytes

    def write(self, ticket: int, schema: Schema, tensors: dict[str, Shaped[Tensor, "seq ..."]]):
        """Copies the tensors in."""
        TICKET.pack_into(self.memory, 0, ticket)
        offsets, _ = layout(schema, len(tensors["input_ids"]))
        whole = torch.frombuffer(self.memory, dtype=torch.uint8)
        for name, tensor in tensors.items():
            part = whole[offsets[name] : offsets[name] + tensor.nbytes]
            part.copy_(tensor.flatten().view(torch.uint8))


class FilePool:
    """The producer's files: one per unacknowledged example, reused afterwards."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._places = places()
        self._folder = PrivateFolder(self._places.pop(0))
        self._removed: list[PrivateFolder] = []
        self._free: list[WrittenFile] = []
        self._ticket = 0

    def write(
        self, tensors: dict[str, Shaped[Tensor, "seq ..."]]
    ) -> tuple[WrittenFile, SharedFile]:
        """The file that holds them now; `give_back` when they have been read.

        Raises:
            SpeculatorError: neither memory nor the disk has room.
        """
        _, size_bytes = layout(self.schema, len(tensors["input_ids"]))
        file = self._take(size_bytes)
        self._ticket += 1
        file.write(self._ticket, self.schema, tensors)
        return file, SharedFile(path=str(file.path), ticket=self._ticket)

    def give_back(self, file: WrittenFile) -> None:
        self._free.append(file)

    def remove(self) -> None:
        for folder in [*self._removed, self._folder]:
            folder.remove()

    def _take(self, size_bytes: int) -> WrittenFile:
        free = sorted(self._free, key=lambda file: file.size_bytes)
        for file in free:
            if file.size_bytes >= size_bytes:
                self._free.remove(file)
                return file
        if free:  # in place of the largest that is too small
            self._free.remove(free[-1])
            free[-1].path.unlink()
        return self._make(rounded(size_bytes))

    def _make(self, size_bytes: int) -> WrittenFile:
        try:
            return WrittenFile(self._folder.path, size_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            if not self._places:
                raise SpeculatorError(
                    f"{self._folder.path.parent} has no room for an example; expected "
                    f"{size_bytes} free bytes. Free some memory, or reduce sync.queue_size."
                ) from error
        place = self._places.pop(0)
        logger.warning("%s is full; the queue continues in %s", self._folder.path.parent, place)
        self._removed.append(self._folder)
        self._folder = PrivateFolder(place)
        return self._make(size_bytes)


class FileReader:
    """The consumer's view of such files; the last ``num_kept`` stay mapped."""

    def __init__(self, schema: Schema, num_kept: int) -> None:
        self.schema = schema
        self.num_kept = num_kept
        self._open: OrderedDict[str, mmap.mmap] = OrderedDict()

    def open(self, file: SharedFile, num_tokens: int) -> mmap.mmap:
        """Raises:
        FrameError: it is not a file of `FilePool`, or too small.
        """
        memory = self._open.pop(file.path, None) or _map(Path(file.path))
        self._open[file.path] = memory
        if len(self._open) > self.num_kept:
            self._open.popitem(last=False)
        _, size_bytes = layout(self.schema, num_tokens)
        if len(memory) < size_bytes:
            raise FrameError(f"{file.path} has {len(memory)} bytes, expected {size_bytes}")
        return memory

    def read(
        self, memory: mmap.mmap, ticket: int, num_tokens: int
    ) -> dict[str, Shaped[Tensor, "seq ..."]] | None:
        """Copies the tensors; None if the producer has reused the file meanwhile.

        Raises:
            FrameError: the content is damaged.
        """
        whole, tensors = torch.frombuffer(memory, dtype=torch.uint8), {}
        offsets, _ = layout(self.schema, num_tokens)
        copies = {
            name: whole[offsets[name] : offsets[name] + num_tokens * row_bytes(spec)].clone()
            for name, spec in self.schema.fields.items()
        }
        if TICKET.unpack_from(memory, 0)[0] != ticket:
            return None
        for name, spec in self.schema.fields.items():
            tensors[name] = tensor_of(copies[name].numpy().data, spec, num_tokens)
        return tensors


def layout(schema: Schema, num_tokens: int) -> tuple[dict[str, int], int]:
    """Offset of each tensor, and the size of the whole file."""
    offsets, end = {}, ALIGNMENT
    for name, spec in schema.fields.items():
        offsets[name] = end
        end += -(-num_tokens * row_bytes(spec) // ALIGNMENT) * ALIGNMENT
    return offsets, end


def rounded(size_bytes: int) -> int:
    """The size rounded up by at most an eighth, so that similar examples can share files."""
    step = max(SMALLEST_FILE, 2 ** (size_bytes.bit_length() - 4))
    return -(-size_bytes // step) * step


def _map(path: Path) -> mmap.mmap:
    if not is_private(path.parent):
        raise FrameError(f"{str(path.parent)[:200]!r} is not a queue's folder")
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        raise FrameError(f"{str(path)[:200]!r} cannot be read: {error}") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise FrameError(f"{str(path)[:200]!r} is not a file")
        return mmap.mmap(handle, 0)
    except (OSError, ValueError) as error:
        raise FrameError(f"{str(path)[:200]!r} cannot be mapped: {error}") from error
    finally:
        os.close(handle)
