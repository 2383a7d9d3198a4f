"""Device and number type of a training process."""

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
