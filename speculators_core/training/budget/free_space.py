"""Free memory and disk space of a process."""

import os
from collections.abc import Iterable
from pathlib import Path
from shutil import disk_usage

import torch
from torch import nn

from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.training.ranks import local_world_size

MAIN_MEMORY = "main memory"
DISK = "disk of "


def available_bytes(place: str, draft: SpeculatorModel, output: Path) -> int:
    """Free bytes, and those that draft, verifier or an earlier start of the run use already.

    ``place`` is `MAIN_MEMORY`, a device or the `DISK` of ``output``. Processes of one machine share
    its main memory.
    """
    if place.startswith(DISK):
        files = [file.lstat() for file in output.rglob("*") if not file.is_dir()]
        return free_disk_bytes(output) + sum(file.st_size for file in files)
    device_type = "cpu" if place == MAIN_MEMORY else torch.device(place).type
    held = bytes_of([draft, *attached_to(draft)], device_type)
    if place != MAIN_MEMORY:
        return torch.cuda.mem_get_info(place)[0] + held
    return free_main_memory_bytes() // local_world_size() + held


def attached_to(draft: SpeculatorModel) -> list[nn.Module]:
    """The verifier as far as it is attached, with its head."""
    head = draft.verifier_head
    try:
        return [draft.verifier, head]
    except SpeculatorError:
        return [head]


def bytes_of(modules: Iterable[nn.Module], device_type: str | None = None) -> int:
    """Bytes of all weights and buffers, each memory once; on one kind of device if named."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors
        if device_type in (None, tensor.device.type)
    }
    return sum(storages.values())


def free_disk_bytes(folder: Path) -> int:
    """Free bytes of the disk that the folder is on, or will be."""
    folder = folder.resolve()
    return disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


def free_main_memory_bytes() -> int:
    """Memory that is still available, within the limits of this process's control groups."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_free_in_groups()])


def _free_in_groups(
    own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Memory left below the limit of each control group, of version 1 or 2, that has a limit.

    Files in the cache count as free: they are dropped when memory is short.
    """
    found = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_file, used_file, cache = mounted, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            base, cache = mounted / "memory", "total_"
            limit_file, used_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in [f for f in (group, *group.parents) if f.is_relative_to(base)]:
            try:
                limit, used = (folder / limit_file).read_text(), (folder / used_file).read_text()
                lines = (folder / "memory.stat").read_text().splitlines()
                stat = dict(line.split() for line in lines)
            except OSError:  # the root has no limit, and not every parent is visible
                continue
            if limit.strip() != "max":
                found.append(int(limit) - int(used) + int(stat.get(f"{cache}inactive_file", 0)))
    return found
