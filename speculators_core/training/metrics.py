"""Weighted means over batches and ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightedMeans:
    """Means by name. Values stay on their device until they are read, so that no step waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float], weight: Tensor) -> None:
        """Adds the means of one batch; ``weight`` is the number of tokens that they cover."""
        for name, value in values.items():
            mean = torch.as_tensor(value, dtype=torch.float64, device=weight.device).detach()
            own = torch.stack([mean * weight, weight.to(torch.float64)])
            self._sums[name] = self._sums[name] + own if name in self._sums else own

    def take(self) -> dict[str, float]:
        """The means over all ranks since the last call; every rank calls it with the same names."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        self._sums = {}
        means = (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()
        return dict(zip(names, means, strict=True))
