"""Muon for matrices and AdamW for the rest."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speculators_core.training.device import product_dtype

ADAMW_BETAS = (0.9, 0.95)


def adamw(
    model: PreTrainedModel, learning_rate: float, weight_decay: float = 0.1
) -> torch.optim.AdamW:
    """AdamW for all weights; vectors do not decay."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return _adamw(trained, learning_rate, weight_decay)


def _adamw(
    weights: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    groups: list[dict[str, object]] = [
        {"params": [w for w in weights if w.ndim >= 2]},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=learning_rate, betas=ADAMW_BETAS, weight_decay=weight_decay)


class Muon(torch.optim.Muon):
    """PyTorch's Muon, whose iteration runs in bfloat16 only where the machine multiplies in it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            lr, momentum = float(group["lr"]), group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(buffer, momentum)
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"])
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update, alpha=-lr * 0.2 * max(weight.shape) ** 0.5)
        return loss


def orthogonal(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7
) -> Tensor:
    """The nearest matrix with singular values near 1, by a quintic Newton-Schulz iteration."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if is_tall else matrix).to(product_dtype(matrix.device))
    wide = wide / wide.norm().clamp(min=eps)  # so that no singular value is above 1
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on hidden weight matrices, AdamW on embeddings, heads and vectors.

    Both have one learning rate: Muon's update is scaled to the root mean square of AdamW's
    (arXiv:2502.16982, equation 4). Schedulers and checkpoints see an ordinary optimizer.
    """

    def __init__(self, model: PreTrainedModel, learning_rate: float, weight_decay: float = 0.1):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        vocabulary = {id(end.weight) for end in ends if end is not None}
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        matrices = [w for w in trained if w.ndim == 2 and id(w) not in vocabulary]
        others = [w for w in trained if w.ndim != 2 or id(w) in vocabulary]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                Muon(
                    matrices,
                    lr=learning_rate,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self.parts.append(_adamw(others, learning_rate, weight_decay))
        super().__init__([{"params": trained}], {"lr": learning_rate})
        self._share_groups()

    def _share_groups(self) -> None:
        """A scheduler that writes to ``param_groups`` writes to the parts."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
