"""Device and number type of a training process."""

import time
from functools import cache

import torch

from speculators_core.training.ranks import local_rank
from speculators_core.training.settings import TrainingPlan


def training_device() -> torch.device:
    """The device that this process trains on."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def compute_dtype(plan: TrainingPlan, device: torch.device) -> torch.dtype:
    """Type of the computation and of the states that it reads; weights stay float32."""
    is_short = plan.run.dtype == "bfloat16" or (plan.run.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if is_short else torch.float32


@cache
def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its matrix products are at hand, else float32; measured once, in a moment.

    A CPU without bfloat16 in its hardware multiplies in it some 50 times slower than in float32,
    one with it some 3 times faster; a GPU that trains drafts has it.
    """
    if device.type != "cpu":
        return torch.bfloat16
    exact, short = (_product_s(dtype) for dtype in (torch.float32, torch.bfloat16))
    return torch.bfloat16 if short < 2 * exact else torch.float32


def _product_s(dtype: torch.dtype, size: int = 256, times: int = 3) -> float:
    """Time of a product of square matrices, the best of some."""
    matrix = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
