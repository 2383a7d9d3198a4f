"""Muon for matrices and AdamW for the rest."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

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
                torch.optim.Muon(
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
