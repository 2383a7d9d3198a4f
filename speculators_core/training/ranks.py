"""Which process of a run this is, and its device."""

import os

import torch


def rank() -> int:
    """Which of torchrun's processes this is; 0 writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def training_device() -> torch.device:
    """Where this process trains."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")
