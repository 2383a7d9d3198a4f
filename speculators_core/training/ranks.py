"""This process among those of torchrun."""

import os


def rank() -> int:
    """Number of this process among all of the run; 0 writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Number of this process among those of the run on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def environment_without_ranks() -> dict[str, str]:
    """This process's environment for a child that is not one of torchrun's processes."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {name: value for name, value in os.environ.items() if name not in ranks}
