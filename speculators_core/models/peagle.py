"""P-EAGLE (arXiv:2602.01469): EAGLE-3's network in one pass.

Where EAGLE-3 waits for its own token and state, P-EAGLE reads a mask token and a learnt state.
An *element* (anchor a, depth d) is at row p = a + d and predicts token p + 2:

    tokens      x0   x1   x2   x3   x4      features of token i: g_i
    depth 0     row a reads (g_a, x_{a+1})                     -> predicts x_{a+2}
    depth d     row a + d reads (mask state, mask token)       -> predicts x_{a+d+2}

    sees          depth 0 of rows      of anchor 1: depth
                  0  1  2  3               1  2
    (0, 0)        x  .  .  .               .  .
    (1, 0)        x  x  .  .               .  .
    (1, 1)        x  x  .  .               x  .
    (1, 2)        x  x  .  .               x  x

Training all depths at all rows would cost as many passes; conditional drop of depths (COD) keeps a
share of them that falls with the depth, and never a depth without those before it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PretrainedConfig

from speculators_core.batch import PADDING, Batch
from speculators_core.decoding.drafter import Chooser, Confirmed, Proposal
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.format.readings import OtherReading
from speculators_core.models.documented.tensors import forward_joined, takes_tensors
from speculators_core.models.eagle_stack import EagleStackConfig, EagleStackModel, EagleStackRecipe
from speculators_core.models.feature_draft import MaskRecipe, check_mask_token, with_mask_token
from speculators_core.models.parts.attention import DraftCache, Keys, OwnKey, Queries, attend_packed
from speculators_core.models.parts.layers import cached_attend, sliding_window
from speculators_core.models.parts.losses import MASK_SUM_FLOOR, LossWeights, score_rows
from speculators_core.models.parts.masks import document_starts, spans_before
from speculators_core.settings import Settings


class PEagleSpeculatorConfig(EagleStackConfig):
    """A P-EAGLE speculator on disk."""

    objective_keys: ClassVar[Mapping[str, str]] = {
        key: key
        for key in ("num_depths", "down_sample_ratio", "down_sample_ratio_min", "max_anchors")
    }

    speculators_model_type: Literal["peagle"] = "peagle"
    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    embed_requires_grad: bool = True

    def other_readings(self, verifier: PretrainedConfig) -> Iterator[OtherReading]:
        """No output is fed back, so norm_output changes nothing."""
        others = super().other_readings(verifier)
        return (other for other in others if "norm_output" not in other.changes)

    def check(self) -> None:
        super().check()
        vocab_size = self.transformer_layer_config.vocab_size
        check_mask_token(self.mask_token_id, vocab_size, "a P-EAGLE draft")
        if self.fc_norm:
            # vLLM takes this key from here alone.
            self.transformer_layer_config.fc_norm = True


class PEagleRecipe(EagleStackRecipe, MaskRecipe):
    """The shape of a fresh draft, as far as its verifier leaves it open."""

    embed_requires_grad: bool = True
    """Train the embeddings too, including the mask token's."""
    speculative_tokens: int = Field(8, ge=1)
    """Tokens proposed in one step."""


class PEagleObjective(Settings):
    """The loss that training minimises."""

    num_depths: int = Field(8, ge=1)
    """Tokens that a row learns to propose at once."""
    down_sample_ratio: float = Field(0.7, gt=0.0, le=1.0)
    """Share of the rows that each further depth keeps: depth d keeps this to the power of d."""
    down_sample_ratio_min: float = Field(0.2, ge=0.0, le=1.0)
    """Smallest share of the rows that a depth keeps."""
    max_anchors: int | None = Field(512, ge=1)
    """Most rows that have depths beyond the first; all where None."""
    loss: LossWeights = {"kl_div": 1.0}
    """Weights of the losses in `losses.LOSSES`, or the name of one."""


@dataclass(frozen=True)
class Elements:
    """The elements of one row of training, ordered by anchor and then by depth.

    An anchor's depths are 0, 1, ... without a gap.
    """

    anchors: Int[Tensor, "elements"]
    depths: Int[Tensor, "elements"]

    @property
    def rows(self) -> Int[Tensor, "elements"]:
        return self.anchors + self.depths


class PEagleDraftModel(EagleStackModel):
    """The P-EAGLE draft: EAGLE-3's network and a learnt state."""

    config_class: ClassVar[type[SpeculatorModelConfig]] = PEagleSpeculatorConfig
    recipe_class = PEagleRecipe
    objective_class = PEagleObjective
    config: PEagleSpeculatorConfig

    @classmethod
    def fresh_config(
        cls,
        verifier_config: PretrainedConfig,
        recipe: EagleStackRecipe,
        draft_vocab_size: int,
        name_or_path: str | None,
    ) -> SpeculatorModelConfig:
        assert isinstance(recipe, PEagleRecipe)
        recipe, mask = with_mask_token(recipe, verifier_config)
        config = super().fresh_config(verifier_config, recipe, draft_vocab_size, name_or_path)
        config.guesses += mask
        return config

    def make_stack(self) -> None:
        super().make_stack()
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, self.fc.in_features))

    # ---- training ----

    def states(self, batch: Batch, elements: Elements) -> Float[Tensor, "1 elements hidden"]:
        """The state that the head reads, for each element; all in one pass."""
        anchors, depths, rows = elements.anchors, elements.depths, elements.rows
        is_masked = depths > 0
        tokens = batch.input_ids[0, (rows + 1).clamp_max(batch.input_ids.shape[1] - 1)]
        tokens = tokens.masked_fill(is_masked, self.config.mask_token_id or 0)
        features = torch.cat(
            [batch.aux_hidden_states[0], self.mask_hidden[0].to(batch.aux_hidden_states)]
        )
        hidden = self.combine(features[None])  # each feature once, not once for each element
        index = rows.masked_fill(is_masked, len(features) - 1)
        positions = batch.position_ids[0, anchors] + depths
        attend = ElementAttention(
            self.config.transformer_layer_config, elements, batch.document_ids[0]
        )
        return self.backbone(tokens[None], hidden[:, index], positions[None], attend)[0]

    @takes_tensors(forward_joined)
    def forward(
        self,
        batch: Batch,
        objective: PEagleObjective | None = None,
        elements: Elements | None = None,
    ) -> tuple[Int[Tensor, "depths batch seq"], Tensor, dict[str, Tensor]]:
        """Draft tokens by depth and row, the loss, and metrics.

        ``elements`` are drawn where None. The loss is one mean over all elements whose row reads a
        token of loss mask 1. Draft tokens are ids of the draft's vocabulary, -1 where there was no
        element or no loss. Metrics, teacher-forced: ``loss``, ``full_acc`` over all elements, and
        ``acc_d`` of each depth.
        """
        objective = objective or PEagleObjective()
        reads = readable_rows(batch)
        if elements is None:
            elements = draw_elements(reads, reads & _next(batch.loss_mask[0]), objective)
        if not len(elements.anchors):  # one with nothing to train: every weight has a gradient
            last = elements.anchors.new_tensor([batch.input_ids.shape[1] - 1])
            elements = Elements(last, torch.zeros_like(last))
        rows = elements.rows
        trained = (reads & _next(batch.loss_mask[0]))[rows]
        scored = score_rows(
            self.states(batch, elements)[0, trained],
            self.lm_head.weight,
            self.verifier_logits(batch),
            rows[trained] + 1,
            objective.loss,
            self.draft_token_ids,
        )
        loss = scored.losses.sum() / (scored.is_covered.sum() + MASK_SUM_FLOOR)
        num_depths = int(elements.depths.max()) + 1
        draft_tokens = torch.full((num_depths, *batch.input_ids.shape), -1, device=rows.device)
        depths = elements.depths[trained]
        draft_tokens[depths, 0, rows[trained]] = scored.draft_tokens
        metrics = {"loss": loss.detach(), "full_acc": _mean(scored.is_right)}
        for depth in range(num_depths):
            metrics[f"acc_{depth}"] = _mean(scored.is_right[depths == depth])
        return draft_tokens, loss, metrics

    # ---- decoding ----

    @torch.no_grad()
    def propose(
        self, state: DraftCache, confirmed: Confirmed, num_tokens: int, choose: Chooser
    ) -> Proposal:
        batch, num_new = confirmed.positions.shape
        ahead = torch.arange(1, num_tokens, device=confirmed.positions.device)
        masks = ahead.new_full((batch, num_tokens - 1), self.config.mask_token_id or 0)
        tokens = torch.cat([confirmed.token_ids[:, 1:], masks], dim=1)
        positions = torch.cat([confirmed.positions, confirmed.positions[:, -1:] + ahead], dim=1)
        features = [confirmed.hidden_states, self.mask_hidden.expand(batch, num_tokens - 1, -1)]
        hidden = self.combine(torch.cat(features, dim=1))
        num_confirmed = state.length + num_new
        attend = cached_attend(self.config.transformer_layer_config, state, positions)
        output, _ = self.backbone(tokens, hidden, positions, attend)
        state.crop(num_confirmed)
        return self.choose(self.lm_head(output[:, num_new - 1 :]), choose)


class ElementAttention:
    """Attention among elements: depth 0 up to the anchor, and the anchor's chain."""

    def __init__(
        self, config: PretrainedConfig, elements: Elements, document_ids: Int[Tensor, "seq"]
    ):
        self.config = config
        self.elements = elements
        self.is_context = elements.depths == 0
        # Rows of the context are numbered by anchor; those without an element leave a gap.
        number = torch.cumsum(self.is_context, 0) - 1  # of each element's anchor
        starts = document_starts(document_ids)[elements.anchors]
        first = torch.searchsorted(elements.anchors[self.is_context], starts)
        self.ends, self.starts = number + 1, first
        self.num_chained = int(elements.depths.max()) if len(elements.depths) else 0

    def __call__(self, layer: int, queries: Queries, keys: Keys, values: Keys) -> Queries:
        depths = self.elements.depths
        window = sliding_window(self.config, layer)
        spans = spans_before(self.ends, self.starts, depths, window)
        context = keys[:, :, self.is_context], values[:, :, self.is_context]
        chain = [
            OwnKey(_back(keys, by), _back(values, by), depths > by)
            for by in range(min(self.num_chained, window or self.num_chained))
        ]
        return attend_packed(queries, *context, spans, chain)


def _back(keys: Keys, by: int) -> Keys:
    """Each element's key ``by`` elements before it: of the same anchor, where its depth is more."""
    return nn.functional.pad(keys[:, :, : keys.shape[2] - by], (0, 0, by, 0))


def readable_rows(batch: Batch) -> Bool[Tensor, "seq"]:
    """Rows whose next token is of their document: those that a draft runs over."""
    documents = batch.document_ids[0]
    return (documents == _next(documents, PADDING)) & (documents != PADDING)


def draw_elements(
    readable: Bool[Tensor, "seq"], trained: Bool[Tensor, "seq"], objective: PEagleObjective
) -> Elements:
    """Every readable row at depth 0, and further depths by conditional drop.

    Of the n rows with a loss (at most ``max_anchors`` of them, drawn), depth d keeps
    ``max(0, n - d) * max(ratio ** d, least ratio)``, drawn among the rows that follow one kept at
    depth d - 1: so a chain has no gap. A row whose anchor would lie in another document has none.
    """
    rows = torch.arange(len(trained), device=trained.device)
    anchors, depths = [rows[readable]], [torch.zeros_like(rows[readable])]
    seeds = rows[trained]
    if objective.max_anchors is not None:
        seeds = _draw(seeds, objective.max_anchors)
    pool, num_seeds = seeds, len(seeds)
    for depth in range(1, objective.num_depths):
        ratio = max(objective.down_sample_ratio**depth, objective.down_sample_ratio_min)
        count = int(max(0, num_seeds - depth) * ratio)
        pool = pool[pool >= 1]
        kept = _draw(pool[readable[pool - 1]], count)
        if not len(kept):
            break
        anchors.append(kept - depth)
        depths.append(torch.full_like(kept, depth))
        following = kept[kept + 1 < len(trained)] + 1
        pool = following[trained[following]]
    all_anchors, all_depths = torch.cat(anchors), torch.cat(depths)
    order = torch.argsort(all_anchors * objective.num_depths + all_depths)
    return Elements(all_anchors[order], all_depths[order])


def _draw(rows: Int[Tensor, "rows"], count: int) -> Int[Tensor, "drawn"]:
    """So many of the rows, ascending; all where there are fewer."""
    if len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), device=rows.device)[:count].sort().values]


def _next(values: Tensor, last: int = 0) -> Tensor:
    """Each row's successor's value."""
    return torch.cat([values[1:], values.new_full((1,), last)])


def _mean(values: Bool[Tensor, "rows"]) -> Float[Tensor, ""]:
    return values.sum() / max(1, len(values))
