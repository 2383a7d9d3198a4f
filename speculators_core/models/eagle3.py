"""EAGLE-3 (arXiv:2503.01840): drafts from the verifier's states.

Row i joins the verifier's states of token i, from several layers, with the embedding of token
i + 1, and predicts token i + 2. Further tokens come one at a time: the draft's hidden state takes
the place of the verifier's.

    tokens      x0   x1   x2   x3   x4      features of token i: g_i
    step 0      row i reads (g_i, x_{i+1})                     -> predicts x_{i+2}
    step 1      row i reads (output of step 0 at i, x_{i+2})   -> predicts x_{i+3}

Training unrolls the same steps for all rows at once, so the draft learns to read its own output
("training-time test").
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from speculators_core.batch import PADDING, Batch
from speculators_core.decoding.drafter import Chooser, Confirmed, Proposal
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.models.documented.tensors import forward_joined, takes_tensors
from speculators_core.models.eagle_stack import EagleStackConfig, EagleStackModel, EagleStackRecipe
from speculators_core.models.parts.attention import Attend, DraftCache
from speculators_core.models.parts.layers import UnrolledAttention, cached_attend
from speculators_core.models.parts.losses import MASK_SUM_FLOOR, LossWeights, score_rows
from speculators_core.models.parts.unroll import propose_in_steps, unroll
from speculators_core.settings import Settings
from speculators_core.verifier.head import rows_at_once


class Eagle3SpeculatorConfig(EagleStackConfig):
    """An EAGLE-3 speculator on disk."""

    objective_keys: ClassVar[Mapping[str, str]] = {"ttt_steps": "ttt_steps"}

    speculators_model_type: Literal["eagle3"] = "eagle3"


class Eagle3Recipe(EagleStackRecipe):
    """The shape of a fresh draft, as far as its verifier leaves it open."""

    norm_output: bool = True
    """Feed back the normed state, not the raw one."""
    embed_requires_grad: bool = False
    """Train the embeddings too."""
    speculative_tokens: int = Field(3, ge=1)
    """Tokens proposed in one step."""


class Eagle3Objective(Settings):
    """The loss that training minimises."""

    ttt_steps: int = Field(3, ge=1)
    """Steps of the training unroll."""
    ttt_step_loss_decay: float = Field(1.0, gt=0.0)
    """Decay of the steps' weights: step k counts with this to the power of k."""
    use_off_policy_tokens: bool = False
    """Read the draft's tokens after the first step instead of the text's; not in evaluation."""
    loss: LossWeights = {"kl_div": 1.0}
    """Weights of the losses in `losses.LOSSES`, or the name of one."""


class Eagle3DraftModel(EagleStackModel):
    """The EAGLE-3 draft."""

    config_class: ClassVar[type[SpeculatorModelConfig]] = Eagle3SpeculatorConfig
    recipe_class = Eagle3Recipe
    objective_class = Eagle3Objective
    unneeded = (*EagleStackModel.unneeded, "mask_hidden")
    config: Eagle3SpeculatorConfig

    def step(
        self,
        token_ids: Int[Tensor, "batch seq"],
        hidden: Float[Tensor, "batch seq hidden"],
        position_ids: Int[Tensor, "batch seq"],
        attend: Attend,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch seq hidden"]]:
        """The states that the head reads, and those that are fed back."""
        output, raw = self.backbone(token_ids, hidden, position_ids, attend)
        return output, output if self.config.norm_output else raw

    # ---- training ----

    @classmethod
    def get_trainer_kwargs(cls, **kwargs: Any) -> tuple[dict[str, Settings], dict[str, Settings]]:
        train, _ = super().get_trainer_kwargs(**kwargs)
        by_text = train["objective"].model_copy(update={"use_off_policy_tokens": False})
        return train, {"objective": by_text}

    def unroll(
        self, batch: Batch, num_steps: int, own_tokens: bool = False
    ) -> Iterator[Float[Tensor, "batch rows hidden"]]:
        """The state that the head reads, step by step; step k has ``seq - 1 - k`` rows.

        Row i of step k predicts token i + 2 + k. Tokens are the true ones throughout, or with
        ``own_tokens`` after the first step the draft's.
        """
        attend = UnrolledAttention(self.config.transformer_layer_config, batch.document_ids[0, :-1])
        hidden = self.combine(batch.aux_hidden_states[:, :-1])
        step = partial(self.step, attend=attend)
        return unroll(batch, hidden, num_steps, step, self._predict if own_tokens else None)

    @torch.no_grad()
    def _predict(self, output: Float[Tensor, "batch rows hidden"]) -> Int[Tensor, "batch rows"]:
        """The most probable token of each row, as an id of the verifier's vocabulary."""
        chunk = rows_at_once(self.lm_head.out_features, output.device)
        best = torch.cat([self.lm_head(rows).argmax(-1) for rows in output[0].split(chunk)])[None]
        return best if self.draft_token_ids is None else self.draft_token_ids[best]

    @takes_tensors(forward_joined)
    def forward(
        self, batch: Batch, objective: Eagle3Objective | None = None
    ) -> tuple[Int[Tensor, "steps batch seq"], Tensor, dict[str, Tensor]]:
        """Draft tokens of every step, the loss, and metrics.

        A row counts at step k if the token that the step reads is of its document and has loss mask
        1. Draft tokens are ids of the draft's vocabulary, -1 where no loss was taken. Metrics of
        step k: ``loss_k``; ``full_acc_k``, the share of rows right at every step up to k; and
        ``cond_acc_k``, that share among the rows right at every earlier step. All are
        teacher-forced, which is not acceptance.
        """
        objective = objective or Eagle3Objective()
        documents = batch.document_ids
        draft_tokens = torch.full(
            (objective.ttt_steps, *documents.shape), -1, device=documents.device
        )
        total = batch.aux_hidden_states.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        right_so_far = torch.ones_like(batch.loss_mask)
        unrolled = self.unroll(batch, objective.ttt_steps, objective.use_off_policy_tokens)
        states, trained = [], []
        for step, output in enumerate(unrolled):
            trained.append(self._trained(batch, step))
            states.append(output[trained[step]])
        if not states:
            return draft_tokens, total, metrics
        scored = score_rows(
            torch.cat(states),
            self.lm_head.weight,
            self.verifier_logits(batch),
            torch.cat([own[0].nonzero()[:, 0] + 1 + step for step, own in enumerate(trained)]),
            objective.loss,
            self.draft_token_ids,
        )
        scores = scored.split([len(rows) for rows in states])
        for step, (own, score) in enumerate(zip(trained, scores, strict=True)):
            num_rows = own.shape[1]
            loss = score.losses.sum() / (score.is_covered.sum() + MASK_SUM_FLOOR)
            total = total + objective.ttt_step_loss_decay**step * loss

            draft_tokens[step, :, :num_rows][own] = score.draft_tokens
            right = torch.zeros_like(own)
            right[own] = score.is_right
            reached = own & right_so_far[:, :num_rows]
            right_so_far = reached & right
            metrics[f"loss_{step}"] = loss.detach()
            metrics[f"full_acc_{step}"] = right_so_far.sum() / own.sum().clamp_min(1)
            metrics[f"cond_acc_{step}"] = right_so_far.sum() / reached.sum().clamp_min(1)
        return draft_tokens, total, metrics

    @staticmethod
    def _trained(batch: Batch, step: int) -> Bool[Tensor, "batch rows"]:
        """The rows of a step that count."""
        documents = batch.document_ids
        reads = slice(1 + step, documents.shape[1])
        first = documents[:, : documents.shape[1] - 1 - step]
        return batch.loss_mask[:, reads] & (first != PADDING) & (documents[:, reads] == first)

    # ---- decoding ----

    @torch.no_grad()
    def propose(
        self, state: DraftCache, confirmed: Confirmed, num_tokens: int, choose: Chooser
    ) -> Proposal:
        def step(tokens: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            attend = cached_attend(self.config.transformer_layer_config, state, positions)
            return self.step(tokens, hidden, positions, attend)

        def to_proposal(output: Tensor) -> Proposal:
            return self.choose(self.lm_head(output), choose)

        hidden = self.combine(confirmed.hidden_states)
        return propose_in_steps(state, confirmed, hidden, num_tokens, step, to_proposal)
