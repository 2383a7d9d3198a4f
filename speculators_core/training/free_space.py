"""What memory and disks have left for this process."""

import os
from pathlib import Path
from shutil import disk_usage


def free_disk_bytes(folder: Path) -> int:
    """Of the disk that the folder is on, or will be."""
    folder = folder.resolve()
    return disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


def free_main_memory_bytes() -> int:
    """What the system can still give, within the limits of this process's control groups."""
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
    """What is left below the limit of each control group, of version 1 or 2, that has one.

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
                stat = dict(line.split() for line in (folder / "memory.stat").open())
            except OSError:  # the root has no limit, and not every parent is visible
                continue
            if limit.strip() != "max":
                found.append(int(limit) - int(used) + int(stat.get(f"{cache}inactive_file", 0)))
    return found
