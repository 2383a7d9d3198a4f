"""DFlash (arXiv:2602.06036): a block of tokens from one pass.

The verifier's states of the text are keys and values for every layer; they pass through no layer
themselves. A block of mask tokens after an *anchor*, the last token that is known, reads them and
predicts all its tokens at once. Row t holds token x_t and its features g_t; anchor p has the slots
0..B-1:

    sees             context of rows      own block, slot          (causal blocks)
                      0  1  ..  p-1  p      0  1  2  3               0  1  2  3
    slot 0: x_p       x  x  x   x    .      x  x  x  x               x  .  .  .
    slot 1: mask      x  x  x   x    .      x  x  x  x               x  x  .  .
    slot 2: mask      x  x  x   x    .      x  x  x  x               x  x  x  .

Slot s is at the place of token p + s and predicts x_{p+s}; with ``sample_from_anchor`` x_{p+s+1}.
The anchor's own state is unknown when it is served, so no slot sees it.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PretrainedConfig

from speculators_core.batch import PADDING, Batch
from speculators_core.decoding.drafter import Chooser, Confirmed, Proposal
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.models.documented.tensors import forward_blocks, takes_tensors
from speculators_core.models.feature_draft import (
    AuxLayerIds,
    DraftRecipe,
    FeatureDraftConfig,
    FeatureDraftModel,
    MaskRecipe,
    check_mask_token,
    draft_layer_config,
    recipe_layer_ids,
    speculators_config,
    with_mask_token,
)
from speculators_core.models.parts.attention import (
    Attend,
    DraftCache,
    Keys,
    OwnKey,
    Queries,
    attend_packed,
)
from speculators_core.models.parts.layers import (
    FAMILIES,
    as_qwen3,
    decoder_layer,
    keys_and_values,
    sliding_window,
)
from speculators_core.models.parts.losses import MASK_SUM_FLOOR, LossWeights, score_rows
from speculators_core.models.parts.masks import document_starts, spans_before
from speculators_core.settings import Settings

logger = logging.getLogger(__name__)


class DFlashSpeculatorConfig(FeatureDraftConfig):
    """A DFlash speculator on disk."""

    layer_ids_key: ClassVar[str] = "aux_hidden_state_layer_ids"
    objective_keys: ClassVar[Mapping[str, str]] = {"max_anchors": "max_anchors"}

    speculators_model_type: Literal["dflash"] = "dflash"
    block_size: Annotated[int, Field(ge=2)] = 8
    aux_hidden_state_layer_ids: AuxLayerIds | None = None
    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    sliding_window_non_causal: bool = False
    sample_from_anchor: bool = False

    @property
    def stated_layer_ids(self) -> list[int] | None:
        return self.aux_hidden_state_layer_ids

    def check(self) -> None:
        super().check()
        layer_config = self.transformer_layer_config
        as_qwen3(layer_config)
        if self.aux_hidden_state_layer_ids is None:
            raise SpeculatorError(
                "aux_hidden_state_layer_ids is missing in the config: a DFlash draft has no "
                "default. Add the verifier layers that it was trained on.",
                cause="wrong layer ids",
            )
        check_mask_token(self.mask_token_id, layer_config.vocab_size, "a DFlash draft")
        windows = {sliding_window(layer_config, i) for i in range(layer_config.num_hidden_layers)}
        if any(window is not None and window < self.block_size for window in windows):
            raise SpeculatorError(
                f"sliding_window {layer_config.sliding_window} is smaller than block_size "
                f"{self.block_size}: slots would not see their block. Set it to at least "
                f"{self.block_size}, or lower block_size."
            )
        is_stated = getattr(layer_config, "is_causal", None) is not None
        if windows == {None} and not is_stated and not self.sliding_window_non_causal:
            # In the format full attention is bidirectional whatever the value of this key; vLLM
            # reads the key for every layer and would serve the block causally.
            logger.warning(
                "sliding_window_non_causal was false beside full attention alone: taken for true"
            )
            self.sliding_window_non_causal = True
        causal = {self.is_causal(i) for i in range(layer_config.num_hidden_layers)}
        if len(causal) > 1:
            logger.warning(
                "full attention beside causal sliding: vLLM 0.32 serves every layer causally; "
                "train with sliding_window_non_causal to serve what was trained"
            )

    def is_causal(self, layer: int) -> bool:
        """A slot of this layer sees its block up to itself, not all of it."""
        stated = getattr(self.transformer_layer_config, "is_causal", None)
        if stated is not None:
            return bool(stated)
        is_sliding = sliding_window(self.transformer_layer_config, layer) is not None
        return is_sliding and not self.sliding_window_non_causal

    @property
    def first_slot(self) -> int:
        """The first slot that predicts a token."""
        return 0 if self.sample_from_anchor else 1


class DFlashRecipe(DraftRecipe, MaskRecipe):
    """The shape of a fresh draft, as far as its verifier leaves it open."""

    layer_type: Literal["llama", "qwen3"] = "qwen3"
    """Config of the draft's layers; the network is Qwen3's, with its q and k norms, either way."""
    num_layers: int = Field(5, ge=1)
    block_size: int = Field(16, ge=2)
    """Slots of a block, including the anchor's."""
    causal: bool = False
    """Let a slot see its block up to itself instead of all of it."""
    sample_from_anchor: bool = False
    """Let the anchor's slot predict a token too; vLLM 0.32 does not serve that."""


class DFlashObjective(Settings):
    """The loss that training minimises."""

    max_anchors: int = Field(512, ge=1)
    """Most blocks of a packed row, spread over its trained tokens."""
    loss: LossWeights = {"kl_div": 1.0}
    """Weights of the losses in `losses.LOSSES`, or the name of one."""
    position_weights: Literal["exponential", "dpace"] = "exponential"
    """Weights of a block's slots: a fixed decay, or the chance that each is reached."""
    decay_length: float = Field(4.0, gt=0.0)
    """Slots after which the exponential weight has fallen to 1/e."""
    dpace_smoothing: float = Field(0.5, ge=0.0, le=1.0)
    """Share of certainty mixed into each slot's chance of acceptance."""

    @model_validator(mode="after")
    def _dpace_reads_cross_entropy(self) -> "DFlashObjective":
        if self.position_weights == "dpace" and dict(self.loss) != {"ce": 1.0}:
            raise ValueError("position_weights 'dpace' needs the loss 'ce' alone; set loss to ce")
        idle = {"exponential": "dpace_smoothing", "dpace": "decay_length"}[self.position_weights]
        if idle in self.model_fields_set:
            raise ValueError(
                f"{idle} has no effect with position_weights {self.position_weights!r}; remove it"
            )
        return self


class DFlashDraftModel(FeatureDraftModel):
    """The DFlash draft: fc, layers and norm. Embeddings and a whole head are the verifier's."""

    config_class: ClassVar[type[SpeculatorModelConfig]] = DFlashSpeculatorConfig
    recipe_class = DFlashRecipe
    objective_class = DFlashObjective
    vocabulary_weights = ("lm_head.weight",)
    aliases = {
        **FeatureDraftModel.aliases,
        "encoder.fc.": "fc.",
        "encoder.output_norm_enc.": "hidden_norm.",
    }
    config: DFlashSpeculatorConfig
    embed_tokens: nn.Embedding | None
    lm_head: nn.Linear | None

    def __init__(
        self, config: DFlashSpeculatorConfig, verifier=None, verifier_attachment_mode=None
    ):  # type: ignore[no-untyped-def]  # as in the base
        super().__init__(config, verifier, verifier_attachment_mode)
        layer_config, family = as_qwen3(config.transformer_layer_config), FAMILIES["qwen3"]
        hidden, norm_eps = layer_config.hidden_size, layer_config.rms_norm_eps
        self.fc = self.make_fc()
        self.hidden_norm = family.norm(hidden, eps=norm_eps)
        self.layers = nn.ModuleList(
            family.decoder_layer(layer_config, index)
            for index in range(layer_config.num_hidden_layers)
        )
        self.norm = family.norm(hidden, eps=norm_eps)
        self.rotary_emb = family.rotary(layer_config)
        self.embed_tokens = self.lm_head = None
        self.make_vocabulary()
        if not config.vocabulary.is_whole:
            self.adopt(["lm_head.weight"])
        self.post_init()

    @property
    def adoptable(self) -> dict[str, tuple[int, ...]]:
        """vLLM reads both where they are stored; the format leaves them to the verifier."""
        layer_config, vocabulary = self.config.transformer_layer_config, self.config.vocabulary
        return {
            "embed_tokens.weight": (vocabulary.verifier_size, layer_config.hidden_size),
            "lm_head.weight": (vocabulary.size, layer_config.hidden_size),
        }

    def adopt(self, names: Collection[str]) -> None:
        if "embed_tokens.weight" in names:
            num_tokens, hidden = self.adoptable["embed_tokens.weight"]
            self.embed_tokens = nn.Embedding(num_tokens, hidden)
            self.embed_tokens.requires_grad_(False)
        if "lm_head.weight" in names:
            size, hidden = self.adoptable["lm_head.weight"]
            self.lm_head = nn.Linear(hidden, size, bias=False)
            self.lm_head.requires_grad_(False)

    def fill_unset(self) -> None:
        """As for every draft; and drops adopted tensors that are the attached verifier's."""
        super().fill_unset()
        if self.attached is None:
            return
        differing = self.differing_ends()
        if "embed_tokens.weight" not in differing:
            self.embed_tokens = None
        if self.config.vocabulary.is_whole and "lm_head.weight" not in differing:
            self.lm_head = None

    def get_input_embeddings(self) -> nn.Embedding | None:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.lm_head

    @classmethod
    def fresh_config(
        cls,
        verifier_config: PretrainedConfig,
        recipe: DFlashRecipe,
        draft_vocab_size: int,
        name_or_path: str | None,
    ) -> DFlashSpeculatorConfig:
        recipe, mask = with_mask_token(recipe, verifier_config)
        layer_config, guesses = draft_layer_config(verifier_config, recipe)
        if recipe.causal and recipe.sliding_window is None:
            layer_config.is_causal = True
        config = DFlashSpeculatorConfig(
            transformer_layer_config=layer_config,
            draft_vocab_size=draft_vocab_size,
            block_size=recipe.block_size,
            aux_hidden_state_layer_ids=recipe_layer_ids(verifier_config, recipe),
            mask_token_id=recipe.mask_token_id,
            sliding_window_non_causal=not recipe.causal,
            sample_from_anchor=recipe.sample_from_anchor,
            speculators_config=speculators_config(
                "dflash",
                recipe.block_size - (not recipe.sample_from_anchor),
                verifier_config,
                name_or_path,
            ),
        )
        config.guesses = (*guesses, *mask)
        return config

    # ---- the network ----

    def combine(
        self, hidden_states: Float[Tensor, "batch seq aux_hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """The aux states of each token as the one vector that every layer reads."""
        return self.hidden_norm(self.fc(hidden_states))

    def embed_block(
        self, anchor_tokens: Int[Tensor, "*blocks"], num_slots: int
    ) -> Float[Tensor, "*blocks slots hidden"]:
        """The anchor's embedding, then the mask's; the table is the verifier's."""
        tokens = anchor_tokens[..., None].repeat_interleave(num_slots, dim=-1)
        tokens[..., 1:] = self.config.mask_token_id or 0
        if self.embed_tokens is not None:
            return self.embed_tokens(tokens)
        return self.embed_as_verifier(tokens)

    def backbone(
        self,
        hidden: Float[Tensor, "batch seq hidden"],
        position_ids: Int[Tensor, "batch seq"],
        attend: Attend,
    ) -> Float[Tensor, "batch seq hidden"]:
        rotary = self.rotary_emb(hidden, position_ids)
        for index, layer in enumerate(self.layers):
            hidden = decoder_layer(layer, index, hidden, rotary, attend)
        return self.norm(hidden)

    # ---- training ----

    def states(
        self, batch: Batch, anchors: Int[Tensor, "blocks"]
    ) -> Float[Tensor, "blocks slots hidden"]:
        """The state that the head reads, for each slot of each anchor's block."""
        num_slots = self.config.block_size
        slots = torch.arange(num_slots, device=anchors.device)
        positions = (batch.position_ids[0, anchors, None] + slots).flatten()[None]
        hidden = self.embed_block(batch.input_ids[0, anchors], num_slots).flatten(0, 1)[None]
        context = self.combine(batch.aux_hidden_states)
        rotary = self.rotary_emb(context, batch.position_ids)
        starts = document_starts(batch.document_ids[0])[anchors].repeat_interleave(num_slots)
        ends = anchors.repeat_interleave(num_slots)
        slot = slots.repeat(len(anchors))

        def attend(layer: int, queries: Queries, keys: Keys, values: Keys) -> Queries:
            module = self.layers[layer].self_attn
            window = sliding_window(self.config.transformer_layer_config, layer)
            is_causal = self.config.is_causal(layer)
            own = [
                OwnKey(
                    _slot(keys, index, num_slots),
                    _slot(values, index, num_slots),
                    slot >= index if is_causal else None,
                )
                for index in range(num_slots)
            ]
            spans = spans_before(ends, starts, slot + 1, window)
            return attend_packed(queries, *keys_and_values(module, context, rotary), spans, own)

        return self.backbone(hidden, positions, attend)[0].unflatten(0, (-1, num_slots))

    @takes_tensors(forward_blocks)
    def forward(
        self,
        batch: Batch,
        objective: DFlashObjective | None = None,
        anchors: Int[Tensor, "blocks"] | None = None,
    ) -> tuple[Int[Tensor, "blocks slots"], Tensor, dict[str, Tensor]]:
        """Draft tokens of every block, the loss, and metrics.

        ``anchors`` (ascending rows) are drawn where None. A slot counts if the token at its place
        is of the anchor's document and has loss mask 1, and the token that it predicts is of that
        document too. The loss is the weighted sum over slots, by the number of slots that count.
        Draft tokens are ids of the draft's vocabulary, -1 where no loss was taken. Metrics,
        teacher-forced: ``loss``, ``full_acc``, ``acc_s`` of each slot, and ``eal``, the mean number
        of tokens per block up to the first wrong one, that one included.
        """
        objective = objective or DFlashObjective()
        first = self.config.first_slot
        slots = torch.arange(self.config.block_size, device=batch.input_ids.device)[first:]
        if anchors is None:
            anchors = self.draw_anchors(batch, objective.max_anchors)
        if not len(anchors):  # one block with nothing to train, so that every weight has a gradient
            anchors = anchors.new_tensor([batch.input_ids.shape[1] - 1])
        rows = anchors[:, None] + slots  # [blocks, slots]
        trained = self.trained_slots(batch, anchors)
        scored = score_rows(
            self.states(batch, anchors)[:, first:][trained],
            self.head_weight,
            self.verifier_logits(batch),
            (rows - first)[trained],
            objective.loss,
            self.draft_token_ids,
        )
        losses = scored.losses.new_zeros(trained.shape).masked_scatter(trained, scored.losses)
        is_lost = torch.zeros_like(trained).masked_scatter(trained, ~scored.is_covered)
        weights = position_weights(
            losses.detach().masked_fill(is_lost, torch.inf), trained, objective
        )
        loss = (losses * weights).sum() / (scored.is_covered.sum() + MASK_SUM_FLOOR)
        draft_tokens = torch.full_like(rows, -1)
        draft_tokens[trained] = scored.draft_tokens
        right = torch.zeros_like(trained)
        right[trained] = scored.is_right
        metrics = {"loss": loss.detach(), "full_acc": right.sum() / trained.sum().clamp_min(1)}
        blocks = trained.any(-1)
        leading = (right | ~trained).long().cumprod(-1) * trained
        metrics["eal"] = (leading.sum() + blocks.sum()) / blocks.sum().clamp_min(1)
        for index, slot in enumerate(slots.tolist()):
            count = trained[:, index].sum().clamp_min(1)
            metrics[f"acc_{slot}"] = right[:, index].sum() / count
        return draft_tokens, loss, metrics

    def trained_slots(
        self, batch: Batch, anchors: Int[Tensor, "blocks"]
    ) -> Bool[Tensor, "blocks slots"]:
        """Slots from the first one that predicts a token, where there is something to learn."""
        first, length = self.config.first_slot, batch.input_ids.shape[1]
        slots = torch.arange(first, self.config.block_size, device=anchors.device)
        own = anchors[:, None] + slots
        predicted = own + 1 - first
        documents = batch.document_ids[0]
        last = length - 1
        # Documents are in order: one that holds the predicted token holds the slot's as well.
        same = documents[predicted.clamp_max(last)] == documents[anchors, None]
        return same & batch.loss_mask[0, own.clamp_max(last)] & (predicted < length)

    def draw_anchors(self, batch: Batch, max_anchors: int) -> Int[Tensor, "blocks"]:
        """Trained rows with a slot to train, at even distances from a drawn first one."""
        rows = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        can = batch.loss_mask[0] & (batch.document_ids[0] != PADDING)
        can &= self.trained_slots(batch, rows).any(-1)
        rows = rows[can]
        if len(rows) <= max_anchors:
            return rows
        shares = torch.arange(max_anchors, dtype=torch.float64, device=rows.device)
        drawn = (shares + torch.rand(1, device=rows.device)) * (len(rows) / max_anchors)
        return rows[drawn.long().clamp_max(len(rows) - 1)]

    # ---- decoding ----

    @torch.no_grad()
    def propose(
        self, state: DraftCache, confirmed: Confirmed, num_tokens: int, choose: Chooser
    ) -> Proposal:
        layer_config = self.config.transformer_layer_config
        context = self.combine(confirmed.hidden_states)
        rotary = self.rotary_emb(context, confirmed.positions)
        state.extend_positions(confirmed.positions)
        for index, layer in enumerate(self.layers):
            state.append(index, *keys_and_values(layer.self_attn, context, rotary))
        num_slots = num_tokens + self.config.first_slot
        slots = torch.arange(num_slots, device=context.device)
        positions = confirmed.positions[:, -1:] + 1 + slots
        kept = state.length

        def attend(layer: int, queries: Queries, keys: Keys, values: Keys) -> Queries:
            keys, values = state.append(layer, keys, values)
            mask = state.visible(positions, sliding_window(layer_config, layer))
            if not self.config.is_causal(layer):
                mask[..., kept:] = True
            return nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, enable_gqa=True
            )

        hidden = self.embed_block(confirmed.token_ids[:, -1], num_slots)
        state.extend_positions(positions)
        output = self.backbone(hidden, positions, attend)[:, self.config.first_slot :]
        state.crop(kept)
        return self.choose(nn.functional.linear(output, self.head_weight), choose)


def _slot(keys: Keys, index: int, num_slots: int) -> Keys:
    """The key of one slot of each block, for all slots of the block."""
    blocks = keys.unflatten(2, (-1, num_slots))[:, :, :, index : index + 1]
    return blocks.expand(-1, -1, -1, num_slots, -1).flatten(2, 3)


def position_weights(
    losses: Float[Tensor, "blocks slots"],
    trained: Bool[Tensor, "blocks slots"],
    objective: DFlashObjective,
) -> Float[Tensor, "blocks slots"]:
    """How each slot counts: early ones more, as a later token is lost where an earlier one is.

    With D-PACE a slot counts by the chance that the draft gets as far as that slot or further:
    slot s keeps its token with chance q_s = exp(-CE_s), mixed with certainty to
    u_s = (1 - a) q_s + a; block prefixes live with P_s = u_1 ... u_s; its weight is the sum of P
    from s on.
    """
    if objective.position_weights == "exponential":
        slots = torch.arange(losses.shape[1], device=losses.device)
        return torch.exp(-slots / objective.decay_length).expand_as(losses)
    share = objective.dpace_smoothing
    kept = ((1.0 - share) * torch.exp(-losses) + share).masked_fill(~trained, 1.0)
    reached = kept.cumprod(-1) * trained
    return reached.flip(-1).cumsum(-1).flip(-1) * trained
