"""A power cut: a process is killed, and what it had not brought to disk is lost.

Bytes of a file count as lost beyond what `os.fsync` of it has covered; a name that was given, taken
or removed counts as lost until `os.fsync` of its folder, or with ``keeps_names`` as kept: a file
system is free to do either.
"""

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

CALLS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")


class Disk:
    """Stands in for the calls of `os` that change a folder, or order the changes."""

    def __init__(self, folder: Path, aside: Path, moment: int, keeps_names: bool) -> None:
        self.folder, self.aside, self.moment = folder, aside, moment
        self.keeps_names = keeps_names
        self.count = itertools.count()
        self.real = {name: getattr(os, name) for name in CALLS}
        self.synced = {status.st_ino: status.st_size for status in map(os.stat, files_in(folder))}
        self.undo: list[tuple[Path, Callable[[], object]]] = []
        """Folders whose names are not on disk, and how to undo the change."""
        aside.mkdir()
        for name in CALLS:
            setattr(os, name, self._patched(name))

    def _patched(self, name):
        def call(*args, dir_fd=None, **kwargs):
            if next(self.count) == self.moment:
                self.cut()
            if name == "fsync":
                self.real[name](*args)
                return self._note_fsync(args[0])
            args = [_full(path, dir_fd) if isinstance(path, str | Path) else path for path in args]
            if any(self.folder in Path(path).parents for path in args if isinstance(path, Path)):
                getattr(self, f"_note_{name}")(*args)
            return self.real[name](*args, **kwargs)

        return call

    def _note_fsync(self, file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.is_dir():
            self.undo = [(folder, undo) for folder, undo in self.undo if folder != path]
        else:
            self.synced[os.fstat(file).st_ino] = os.fstat(file).st_size

    def _note_mkdir(self, path: Path, *_: object) -> None:
        if not path.exists():
            self.undo.append((path.parent, lambda: shutil.rmtree(path, ignore_errors=True)))

    def _note_rmdir(self, path: Path) -> None:
        self.undo.append((path.parent, lambda: self.real["mkdir"](path)))

    def _note_unlink(self, path: Path) -> None:
        if path.exists():
            kept = self._keep(path)
            self.undo.append((path.parent, lambda: os.link(kept, path)))

    def _note_replace(self, source: Path, target: Path) -> None:
        kept = self._keep(target) if target.is_file() else None
        was_folder = target.is_dir()

        def undo() -> None:
            if not target.exists():
                return  # lost with its folder
            self.real["rename"](target, source)
            if kept is not None:
                os.link(kept, target)
            if was_folder:
                self.real["mkdir"](target)

        self.undo.append((target.parent, undo))

    _note_rename = _note_replace

    def _keep(self, path: Path) -> Path:
        kept = self.aside / str(len(os.listdir(self.aside)))
        os.link(path, kept)
        return kept

    def cut(self) -> None:
        for name, real in self.real.items():
            setattr(os, name, real)
        for path in files_in(self.folder):
            on_disk = self.synced.get(path.stat().st_ino, 0)
            if path.stat().st_size > on_disk:
                os.truncate(path, on_disk)
        if not self.keeps_names:
            for _, undo in reversed(self.undo):
                undo()
        os.kill(os.getpid(), signal.SIGKILL)


def _full(path: str | Path, dir_fd: int | None) -> Path:
    return Path(path).absolute() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}/{path}")


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def cut_everywhere(
    folder: Path,
    begin: Callable[[Path], object],
    write: Callable[[Path], object],
    check: Callable[[Path, bool], object],
) -> int:
    """Cuts ``write`` before each of its calls in turn, and after all; returns their number.

    ``check`` is called with the folder, which ``begin`` has filled, and whether ``write`` came to
    its end. The caller is a process without threads.
    """
    for moment in itertools.count():
        for keeps_names in (True, False):
            place = folder / f"{moment}-{keeps_names}"
            place.mkdir()
            begin(place)
            read, note = os.pipe()
            if (child := os.fork()) == 0:
                disk = Disk(place, folder / f"{place.name}-aside", moment, keeps_names)
                try:
                    write(place)
                    os.write(note, b"ended")
                    disk.cut()
                finally:
                    os._exit(3)  # an error
            os.close(note)
            has_ended = os.read(read, 5) == b"ended"
            os.close(read)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), f"{place.name}: it raised an error"
            try:
                check(place, has_ended)
            except BaseException as error:
                error.add_note(f"cut before call {moment}, names kept: {keeps_names}")
                raise
            shutil.rmtree(place)
        if has_ended:
            return moment
    raise AssertionError("unreachable")
