"""Where local data may be read and written."""

import os
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
