"""MTP as in FastMTP (arXiv:2509.18362): one block, run repeatedly.

One block of the verifier's kind joins the verifier's last state of token t, as its head reads it
(after the final norm), with the embedding of token t + 1, and predicts token t + 2. Further tokens
come one at a time from the same block, which then reads its own output:

    tokens      x0   x1   x2   x3   x4      post-norm state of token t: y_t
    step 0      row t reads (y_t, x_{t+1})                     -> predicts x_{t+2}
    step 1      row t reads (output of step 0 at t, x_{t+2})   -> predicts x_{t+3}

Embeddings and head are the verifier's, and its checkpoint's alone.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PretrainedConfig

from speculators_core.batch import PADDING, Batch
from speculators_core.decoding.drafter import Chooser, Confirmed, Proposal
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.format.readings import OtherReading
from speculators_core.models.documented.tensors import Rows, takes_tensors
from speculators_core.models.feature_draft import speculators_config
from speculators_core.models.parts.attention import Attend, DraftCache
from speculators_core.models.parts.layers import (
    DraftLayer,
    Hidden,
    Rotary,
    UnrolledAttention,
    cached_attend,
    decoder_layer,
    family_of,
)
from speculators_core.models.parts.losses import (
    MASK_SUM_FLOOR,
    LossWeights,
    Targets,
    score_rows,
)
from speculators_core.models.parts.unroll import propose_in_steps, unroll
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.settings import Settings
from speculators_core.verifier.quantization import without_quantization

IGNORED = -100
"""Target without a loss."""
LAYER_TYPES = ("qwen3", "qwen2", "llama")


class MTPSpeculatorConfig(SpeculatorModelConfig):
    """An MTP speculator on disk; ``transformer_layer_config`` is the verifier's."""

    objective_keys: ClassVar[Mapping[str, str]] = {"num_speculative_steps": "num_steps"}

    speculators_model_type: Literal["mtp"] = "mtp"
    num_nextn_predict_layers: Literal[1] = 1
    verifier_state: Literal["post_norm", "pre_norm"] = "post_norm"

    def check(self) -> None:
        family_of(self.transformer_layer_config, LAYER_TYPES)

    @property
    def verifier_depth(self) -> int:
        return self.transformer_layer_config.num_hidden_layers

    @property
    def aux_layer_ids(self) -> list[int]:
        """The state after the last layer; the draft norms it as the verifier does."""
        return [self.verifier_depth]

    def other_readings(self, verifier: PretrainedConfig) -> Iterator[OtherReading]:
        """The verifier's last state on the other side of its final norm."""
        is_normed = self.verifier_state == "post_norm"
        other, side = ("pre_norm", "before") if is_normed else ("post_norm", "after")
        yield OtherReading(
            "hidden-state timing",
            f"verifier_state {other!r} instead of {self.verifier_state!r}: the verifier's last "
            f"state {side} its final norm",
            {"verifier_state": other},
        )
        yield from super().other_readings(verifier)


class MTPRecipe(Settings):
    """The shape of a fresh draft, as far as its verifier leaves it open."""

    speculative_tokens: int = Field(3, ge=1)
    """Tokens proposed in one step."""


class MTPObjective(Settings):
    """The loss that training minimises."""

    num_steps: int = Field(3, ge=1)
    """Steps of the training unroll."""
    step_weights: tuple[float, ...] | None = None
    """Weight of each step; where None they fall by ``step_decay`` and sum to 1."""
    step_decay: float = Field(0.6, gt=0.0)
    """Decay of the steps' weights: this to the power of k for step k, before scaling to 1."""
    targets: Literal["text", "verifier"] = "verifier"
    """Targets: the verifier's distribution by ``loss``, or the text's token by cross-entropy."""
    loss: LossWeights = {"kl_div": 1.0}
    """Weights of the losses in `losses.LOSSES`, or the name of one; for ``targets`` verifier."""
    attention: Literal["served", "independent"] = "served"
    """Keys that a later step sees: the first step's, as in serving, or those of that step."""

    @model_validator(mode="after")
    def _every_step_has_a_weight(self) -> "MTPObjective":
        if self.step_weights is not None and len(self.step_weights) != self.num_steps:
            raise ValueError(
                f"step_weights has {len(self.step_weights)} weights for {self.num_steps} steps; "
                "give one for each"
            )
        return self

    @model_validator(mode="after")
    def _no_field_is_idle(self) -> "MTPObjective":
        if "loss" in self.model_fields_set and self.targets == "text":
            raise ValueError(
                "loss is for targets 'verifier'; targets 'text' is cross-entropy; remove one"
            )
        if "step_decay" in self.model_fields_set and self.step_weights is not None:
            raise ValueError("step_weights and step_decay exclude each other; set one")
        return self

    @property
    def weights(self) -> list[float]:
        if self.step_weights is not None:
            return list(self.step_weights)
        powers = [self.step_decay**step for step in range(self.num_steps)]
        return [power / sum(powers) for power in powers]


class MTPLayer(DraftLayer):
    """The projection that joins token and state, and then a block of the verifier's kind."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        family = family_of(config, LAYER_TYPES)
        hidden, norm_eps = config.hidden_size, config.rms_norm_eps
        block = family.decoder_layer(config, 0)
        self.input_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.token_layernorm = family.norm(hidden, eps=norm_eps)
        self.hidden_layernorm = family.norm(hidden, eps=norm_eps)
        self.input_layernorm = block.input_layernorm
        self.self_attn = block.self_attn
        self.post_attention_layernorm = block.post_attention_layernorm
        self.mlp = block.mlp
        self.final_layernorm = family.norm(hidden, eps=norm_eps)

    def forward(self, embedding: Hidden, hidden: Hidden, rotary: Rotary, attend: Attend) -> Hidden:
        both = [self.token_layernorm(embedding), self.hidden_layernorm(hidden)]
        joined = self.input_proj(torch.cat(both, dim=-1))  # [batch, seq, hidden]
        return self.final_layernorm(decoder_layer(self, 0, joined, rotary, attend))


class MTPDraftModel(SpeculatorModel):
    """The MTP draft: one block that is run once for each token."""

    config_class: ClassVar[type[SpeculatorModelConfig]] = MTPSpeculatorConfig
    recipe_class = MTPRecipe
    objective_class = MTPObjective
    unneeded = ("embed_tokens.weight", "lm_head.weight")  # the verifier's, here and in vLLM
    config: MTPSpeculatorConfig

    def __init__(self, config: MTPSpeculatorConfig, verifier=None, verifier_attachment_mode=None):  # type: ignore[no-untyped-def]  # as in the base
        super().__init__(config, verifier, verifier_attachment_mode)
        self.layer_config = full_attention(config.transformer_layer_config)
        self.mtp_layers = nn.ModuleList([MTPLayer(self.layer_config)])
        self.rotary_emb = family_of(self.layer_config, LAYER_TYPES).rotary(self.layer_config)
        self.post_init()

    @classmethod
    def fresh_config(
        cls,
        verifier_config: PretrainedConfig,
        recipe: MTPRecipe,
        draft_vocab_size: int,
        name_or_path: str | None,
    ) -> MTPSpeculatorConfig:
        text = verifier_config.get_text_config()
        if text.model_type not in LAYER_TYPES:
            raise SpeculatorError(
                f"an MTP draft repeats a layer of its verifier, and there is none here for "
                f"model_type {text.model_type!r}; expected one of {', '.join(LAYER_TYPES)}. Train "
                "eagle3, peagle or dflash for this verifier."
            )
        return MTPSpeculatorConfig(
            transformer_layer_config=without_quantization(text),
            speculators_config=speculators_config(
                "mtp", recipe.speculative_tokens, verifier_config, name_or_path
            ),
        )

    def start_fresh(self, t2d: Tensor | None, d2t: Tensor | None) -> None:
        if t2d is not None or d2t is not None:
            raise SpeculatorError(
                "t2d and d2t were given; expected none, as an MTP draft has the verifier's "
                "vocabulary. Leave them out."
            )

    @property
    def layers(self) -> nn.ModuleList:
        """The block; stored as ``mtp_layers``."""
        return self.mtp_layers

    @property
    def target_layer_ids(self) -> list[int]:
        """None: the draft reads the last state, which is not an aux state."""
        return []

    # ---- the network ----

    def read_verifier(
        self, last_hidden_states: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """The verifier's state as this draft reads it."""
        if self.config.verifier_state == "pre_norm":
            return last_hidden_states
        head = self.verifier_head
        weight = head.lm_head.weight
        normed = head.norm(last_hidden_states.to(weight.device, weight.dtype))
        return normed.detach().to(self.device, self.dtype)

    def backbone(
        self,
        token_ids: Int[Tensor, "batch seq"],
        hidden: Float[Tensor, "batch seq hidden"],
        position_ids: Int[Tensor, "batch seq"],
        attend: Attend,
    ) -> Float[Tensor, "batch seq hidden"]:
        """One step: the state that the head reads, which is also the one that is fed back."""
        embedding = self.embed_as_verifier(token_ids)
        rotary = self.rotary_emb(embedding, position_ids)
        return self.mtp_layers[0](embedding, hidden, rotary, attend)

    # ---- training ----

    def unroll(
        self, batch: Batch, num_steps: int, attention: Literal["served", "independent"] = "served"
    ) -> Iterator[Float[Tensor, "batch rows hidden"]]:
        """The state that the head reads, step by step; step k has ``seq - 1 - k`` rows.

        Row t of step k predicts token t + 2 + k. Tokens are the true ones throughout.
        """
        hidden = self.read_verifier(batch.last_hidden_states[:, :-1])
        return self._unroll(batch, hidden, num_steps, attention)

    def _unroll(
        self,
        batch: Batch,
        hidden: Float[Tensor, "batch rows hidden"],
        num_steps: int,
        attention: Literal["served", "independent"],
    ) -> Iterator[Float[Tensor, "batch rows hidden"]]:
        documents = batch.document_ids[0, :-1]
        served = UnrolledAttention(self.layer_config, documents)

        def step(tokens: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            is_served = attention == "served"
            attend = served if is_served else UnrolledAttention(self.layer_config, documents)
            output = self.backbone(tokens, hidden, positions, attend)
            return output, output

        return unroll(batch, hidden, num_steps, step)

    def forward_tensors(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        hidden_states: Float[Tensor, "batch seq hidden"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
        step_weights: Sequence[float] | None = None,
        return_dict: bool = True,
        objective: MTPObjective | None = None,
        **kwargs: object,
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """Training as the documents call it: logits [batch, rows, vocab] by step, loss, metrics.

        The draft reads ``hidden_states`` as they are, and learns the text. A sequence too short
        for all steps trains those that it has. Weights of the steps are 1 where None; ``kwargs``
        and ``return_dict`` are ignored.

        Raises:
            SpeculatorError: a tensor is missing or of another shape, or the number of weights is
                not that of the config's steps.
        """
        num_steps = self.config.num_speculative_steps
        weights = step_weights or (objective.weights if objective else [1.0] * num_steps)
        if len(weights) != num_steps:
            raise SpeculatorError(
                f"step_weights has {len(weights)} weights; the config has num_speculative_steps "
                f"{num_steps}. Pass one for each step."
            )
        rows = Rows.read(input_ids, None, position_ids, loss_mask, attention_mask)
        num_texts, length = rows.shape
        num_steps = min(num_steps, max(0, length - 2))
        num_rows = length - num_steps - 1
        width = self.config.verifier_hidden_size
        hidden = rows.states("hidden_states", hidden_states, width).to(self.dtype)
        batch = rows.batch(hidden, hidden)
        first = torch.arange(num_texts, device=hidden.device) * length
        kept = first[:, None] + torch.arange(num_rows, device=hidden.device)
        is_token = rows.document_ids != PADDING
        logits_list: list[Tensor] = []
        total = hidden.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        states = batch.last_hidden_states[:, :-1]
        for step, output in enumerate(self._unroll(batch, states, num_steps, "independent")):
            logits = nn.functional.linear(output[0, kept], self.head_weight)
            predicted = kept + step + 2
            counts = (rows.loss_mask & is_token)[predicted]
            targets = rows.input_ids[predicted].masked_fill(~counts, IGNORED)
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(),
                targets.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            loss = weights[step] * losses / counts.sum().clamp_min(1)
            total = total + loss
            logits_list.append(logits)
            metrics[f"loss_step_{step}"] = loss.detach()
        metrics["loss_sum"] = total.detach()
        metrics["loss_total"] = torch.ones_like(metrics["loss_sum"])
        return logits_list, total, metrics

    @takes_tensors(forward_tensors)
    def forward(
        self, batch: Batch, objective: MTPObjective | None = None
    ) -> tuple[Int[Tensor, "steps batch seq"], Tensor, dict[str, Tensor]]:
        """Draft tokens of every step, the loss, and metrics.

        A row counts at all steps if the tokens that it predicts at each of them are of its
        document; of a document too short for that the first row counts, at the steps that it has.
        At step k a row counts if the token predicted there has loss mask 1. Draft tokens are -1
        where no loss was taken. Metrics of step k, teacher-forced: ``loss_k`` and ``acc_k``.
        """
        objective = objective or MTPObjective()
        length, documents = batch.input_ids.shape[1], batch.document_ids[0]
        steps = objective.num_steps
        rows = torch.arange(length, device=documents.device)
        rows = rows[(documents != PADDING) & _has_steps(documents, steps)]
        draft_tokens = torch.full((steps, *batch.input_ids.shape), -1, device=documents.device)
        total = batch.last_hidden_states.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        trained = [self._trained(batch, rows, step) for step in range(steps)]
        outputs = list(self.unroll(batch, steps, objective.attention))
        trained = trained[: len(outputs)]
        if not outputs:
            return draft_tokens, total, metrics
        scored = score_rows(
            torch.cat([output[0, own] for output, own in zip(outputs, trained, strict=True)]),
            self.head_weight,
            self._targets(batch, objective),
            torch.cat([own + 1 + step for step, own in enumerate(trained)]),
            {"ce": 1.0} if objective.targets == "text" else objective.loss,
        )
        scores = scored.split([len(own) for own in trained])
        for step, (own, score) in enumerate(zip(trained, scores, strict=True)):
            loss = score.losses.sum() / (len(own) + MASK_SUM_FLOOR)
            total = total + objective.weights[step] * loss
            draft_tokens[step, 0, own] = score.draft_tokens
            metrics[f"loss_{step}"] = loss.detach()
            metrics[f"acc_{step}"] = score.is_right.sum() / max(1, len(own))
        return draft_tokens, total, metrics

    @staticmethod
    def _trained(batch: Batch, rows: Int[Tensor, "rows"], step: int) -> Int[Tensor, "some_rows"]:
        """Those of the rows that count at a step."""
        documents, mask = batch.document_ids[0], batch.loss_mask[0]
        rows = rows[rows + 2 + step < len(documents)]
        rows = rows[documents[rows] == documents[rows + 2 + step]]
        return rows[mask[rows + 2 + step]]

    def _targets(self, batch: Batch, objective: MTPObjective) -> Targets:
        """What to learn in each row: the text's next token, or the verifier's logits."""
        if objective.targets == "verifier":
            return self.verifier_logits(batch)
        return batch.input_ids[0, 1:]

    # ---- decoding ----

    @torch.no_grad()
    def propose(
        self, state: DraftCache, confirmed: Confirmed, num_tokens: int, choose: Chooser
    ) -> Proposal:
        head_weight = self.head_weight

        def step(tokens: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            attend = cached_attend(self.layer_config, state, positions)
            output = self.backbone(tokens, hidden, positions, attend)
            return output, output

        def to_proposal(output: Tensor) -> Proposal:
            return choose(nn.functional.linear(output, head_weight))

        hidden = self.read_verifier(confirmed.hidden_states)
        return propose_in_steps(state, confirmed, hidden, num_tokens, step, to_proposal)


def _has_steps(documents: Int[Tensor, "seq"], num_steps: int) -> Bool[Tensor, "seq"]:
    """Rows that predict a token of their document at every step, and the first of short documents.

    3 steps, documents   0 0 0 0 0 0 1 1 1 1
    rows                 x x . . . . x . . .
    """
    ahead = 1 + num_steps
    later = torch.cat([documents[ahead:], documents.new_full((ahead,), PADDING)])[: len(documents)]
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[1:] = documents[1:] != documents[:-1]
    return (documents == later) | is_start


def full_attention(config: PretrainedConfig) -> PretrainedConfig:
    """The verifier's layers without their windows: the block sees the whole text."""
    config = copy.deepcopy(config)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    return config
