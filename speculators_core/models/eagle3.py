"""EAGLE-3 (arXiv:2503.01840): a draft that reads the verifier's mind at three depths.

Row i joins what the verifier thought at token i, from several layers, with the embedding of token
i + 1, and predicts token i + 2. Further tokens come one at a time: the draft's own hidden state
stands in for the verifier's.

    tokens      x0   x1   x2   x3   x4      features of token i: g_i
    step 0      row i reads (g_i, x_{i+1})                     -> predicts x_{i+2}
    step 1      row i reads (output of step 0 at i, x_{i+2})   -> predicts x_{i+3}

Training unrolls the same steps for all rows at once, so the draft learns to live on its own output
("training-time test").
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig, PretrainedConfig, Qwen3Config

from speculators_core.batch import PADDING, Batch
from speculators_core.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators_core.errors import SpeculatorError, first_fault
from speculators_core.layers import (
    Attend,
    InputLayer,
    UnrolledAttention,
    cached_attend,
    decoder_layer,
    family_of,
)
from speculators_core.losses import LOSSES, weighted_loss
from speculators_core.model import SpeculatorModel
from speculators_core.proposals import GreedyTokenProposalConfig
from speculators_core.vocabulary import check_vocabulary

MASK_SUM_FLOOR = 1e-5
DEFAULT_NUM_AUX = 3


class Eagle3SpeculatorConfig(SpeculatorModelConfig):
    """An EAGLE-3 speculator on disk. Defaults are those of readers that leave a key out."""

    speculators_model_type: Literal["eagle3"] = "eagle3"
    draft_vocab_size: Annotated[int, Field(ge=1)] | None = 32_000
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    target_hidden_size: Annotated[int, Field(ge=1)] | None = None
    eagle_aux_hidden_state_layer_ids: list[Annotated[int, Field(ge=0)]] | None = None
    embed_requires_grad: bool = False

    def check(self) -> None:
        family_of(self.transformer_layer_config)
        ids = self.eagle_aux_hidden_state_layer_ids
        if ids is not None and (not ids or ids != sorted(set(ids))):
            raise SpeculatorError(
                f"eagle_aux_hidden_state_layer_ids {ids} must be ascending without doubles: vLLM "
                "sorts them, and fc would read its inputs in another order."
            )
        if self.norm_before_fc and self.fc_norm:
            raise SpeculatorError("norm_before_fc and fc_norm exclude each other; set one.")
        layer_config = self.transformer_layer_config
        if self.draft_vocab_size is None:
            self.draft_vocab_size = layer_config.vocab_size
        if self.draft_vocab_size > layer_config.vocab_size:
            raise SpeculatorError(
                f"draft_vocab_size {self.draft_vocab_size} is larger than the verifier's "
                f"vocabulary of {layer_config.vocab_size}."
            )
        # vLLM sizes the fc of a llama draft by this key, not by the ids.
        num_aux = len(ids) if ids is not None else DEFAULT_NUM_AUX
        stated = getattr(layer_config, "num_aux_hidden_states", num_aux)
        if stated != num_aux:
            raise SpeculatorError(
                f"transformer_layer_config.num_aux_hidden_states is {stated}, but there are "
                f"{num_aux} aux layer ids ({ids})."
            )
        if num_aux != DEFAULT_NUM_AUX:
            layer_config.num_aux_hidden_states = num_aux

    def settle(self, verifier: PretrainedConfig) -> None:
        if self.eagle_aux_hidden_state_layer_ids is None:
            self._default_aux_layer_ids = default_aux_layer_ids(verifier.num_hidden_layers)

    @property
    def aux_layer_ids(self) -> list[int]:
        """Layers whose states the draft reads, ascending; the paper's where the config has none.

        Raises:
            SpeculatorError: the config has none, and the verifier's depth is not known yet.
        """
        if self.eagle_aux_hidden_state_layer_ids is not None:
            return self.eagle_aux_hidden_state_layer_ids
        if not hasattr(self, "_default_aux_layer_ids"):
            raise SpeculatorError(
                "the config has no eagle_aux_hidden_state_layer_ids: the verifier's depth decides. "
                "Attach the verifier first."
            )
        return self._default_aux_layer_ids


def default_aux_layer_ids(num_layers: int) -> list[int]:
    """The paper's choice: the states that enter layers 2, n // 2 and n - 3.

    Raises:
        SpeculatorError: the verifier has too few layers for three of them.
    """
    ids = [2, num_layers // 2, num_layers - 3]
    if ids != sorted(set(ids)):
        raise SpeculatorError(
            f"a verifier of {num_layers} layers is too shallow for the default aux layers {ids}. "
            "Pass aux_layer_ids."
        )
    return ids


class Eagle3Recipe(BaseModel):
    """What decides the shape of a fresh draft, beside its verifier."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    layer_type: Literal["llama", "qwen3"] = "llama"
    """Architecture of the draft's layers."""
    num_layers: int = Field(1, ge=1)
    """Draft layers; the first one reads the embedding beside the hidden state."""
    intermediate_size: int | None = Field(None, ge=1)
    """MLP width; the verifier's where None."""
    sliding_window: int | None = Field(None, ge=1)
    """Keys that a token sees, itself included; all where None."""
    aux_layer_ids: tuple[int, ...] | None = None
    """Verifier layers to read, ascending; the paper's three where None."""
    norm_before_residual: bool = True
    """The first layer's residual is the normed hidden state."""
    norm_before_fc: bool = True
    """One norm over all aux states together."""
    fc_norm: bool = False
    """One norm for each aux state."""
    norm_output: bool = True
    """The normed state is fed back, not the raw one."""
    embed_requires_grad: bool = False
    """Train the embeddings too."""
    speculative_tokens: int = Field(3, ge=1)
    """Tokens proposed in one step."""


def _loss_weights(value: Any) -> Any:
    """The name of one loss stands for that loss alone; every name must be known."""
    weights = {value: 1.0} if isinstance(value, str) else value
    if unknown := [name for name in weights if name not in LOSSES]:
        raise ValueError(f"unknown loss {unknown[0]!r}; known: {', '.join(LOSSES)}")
    return weights


class Eagle3Objective(BaseModel):
    """What training minimises."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    ttt_steps: int = Field(3, ge=1)
    """Steps that the training unroll takes."""
    ttt_step_loss_decay: float = Field(1.0, gt=0.0)
    """Step k counts with this to the power of k."""
    loss: Annotated[Mapping[str, float], BeforeValidator(_loss_weights), Field(min_length=1)] = {
        "kl_div": 1.0
    }
    """Weights of the losses in `losses.LOSSES`, or the name of one."""


@dataclass
class Eagle3State:
    """Keys and values of the rows that the verifier has confirmed."""

    cache: Cache
    length: int = 0


class Eagle3DraftModel(SpeculatorModel):
    """The EAGLE-3 draft: embeddings, fc, one or more layers, norm and head."""

    config_class: ClassVar[type[SpeculatorModelConfig]] = Eagle3SpeculatorConfig
    config: Eagle3SpeculatorConfig
    d2t: Tensor
    t2d: Tensor

    def __init__(
        self, config: Eagle3SpeculatorConfig, verifier=None, verifier_attachment_mode=None
    ):  # type: ignore[no-untyped-def]  # as in the base
        super().__init__(config, verifier, verifier_attachment_mode)
        layer_config = config.transformer_layer_config
        family = family_of(layer_config)
        hidden, vocab = layer_config.hidden_size, layer_config.vocab_size
        draft_vocab = config.draft_vocab_size or vocab
        aux_hidden = config.target_hidden_size or hidden
        num_aux = len(config.eagle_aux_hidden_state_layer_ids or range(DEFAULT_NUM_AUX))
        norm_eps = layer_config.rms_norm_eps
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.fc = nn.Linear(num_aux * aux_hidden, hidden, bias=False)
        self.input_norm = (
            family.norm(num_aux * aux_hidden, eps=norm_eps) if config.norm_before_fc else None
        )
        self.fc_norm = (
            nn.ModuleList(family.norm(aux_hidden, eps=norm_eps) for _ in range(num_aux))
            if config.fc_norm
            else None
        )
        self.layers = nn.ModuleList(
            InputLayer(layer_config, config.norm_before_residual)
            if index == 0
            else family.decoder_layer(layer_config, index)
            for index in range(layer_config.num_hidden_layers)
        )
        self.norm = family.norm(hidden, eps=norm_eps)
        self.lm_head = nn.Linear(hidden, draft_vocab, bias=False)
        self.rotary_emb = family.rotary(layer_config)
        if draft_vocab < vocab:
            self.register_buffer("d2t", torch.zeros(draft_vocab, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(vocab, dtype=torch.bool))
        self.post_init()
        self.embed_tokens.requires_grad_(config.embed_requires_grad)
        self.lm_head.requires_grad_(False)

    # ---- from and to disk ----

    @classmethod
    def from_training_args(
        cls,
        verifier_config: PretrainedConfig,
        t2d: Bool[Tensor, "vocab"] | None = None,
        d2t: Int[Tensor, "draft_vocab"] | None = None,
        *,
        verifier: Any = None,
        name_or_path: str | None = None,
        **kwargs: Any,
    ) -> "Eagle3DraftModel":
        """A fresh draft shaped after its verifier; ``kwargs`` are fields of `Eagle3Recipe`.

        With ``verifier`` (a model, a folder or a hub id) embeddings and head are its copies.
        ``name_or_path`` is what the checkpoint will call the verifier.

        Raises:
            SpeculatorError: a field is unknown or out of bounds, or the maps contradict each other.
        """
        try:
            recipe = Eagle3Recipe.model_validate(kwargs)
        except ValidationError as error:
            raise SpeculatorError(f"from_training_args: {first_fault(error)}") from error
        if (t2d is None) != (d2t is None):
            raise SpeculatorError("t2d and d2t come together; one of them is missing.")
        model = cls(eagle3_config(verifier_config, recipe, d2t, name_or_path))
        if t2d is not None and d2t is not None:
            model.t2d.copy_(t2d)
            model.d2t.copy_(d2t)
            model.check_tensors({"t2d": t2d, "d2t": d2t})
        model.unset = {"embed_tokens.weight", "lm_head.weight"}
        if verifier is not None:
            model.attach_verifier(
                verifier, "full" if isinstance(verifier, nn.Module) else "train_only"
            )
        return model

    @property
    def from_verifier(self) -> tuple[str, ...]:
        """Of a reduced vocabulary the head is the draft's own: vLLM would take the whole one."""
        whole = self.config.draft_vocab_size == self.config.transformer_layer_config.vocab_size
        return ("embed_tokens.weight", "lm_head.weight") if whole else ("embed_tokens.weight",)

    @property
    def optional(self) -> tuple[str, ...]:
        """d2t says all that t2d does, and vLLM reads d2t alone."""
        return (*self.from_verifier, "t2d")

    @staticmethod
    def check_tensors(tensors: Mapping[str, Tensor]) -> None:
        if "t2d" in tensors and "d2t" in tensors:
            check_vocabulary(tensors["t2d"], tensors["d2t"])

    def fill_unset(self) -> None:
        if "t2d" in self.unset:
            self.t2d[self.draft_token_ids] = True
            self.unset.discard("t2d")
        if not self.unset or not self._attached:
            return
        head, token_ids = self.verifier_head, self.draft_token_ids
        ends = {
            "embed_tokens.weight": head.embed_tokens.weight,
            "lm_head.weight": head.lm_head.weight
            if token_ids is None
            else head.lm_head.weight[token_ids],
        }
        for name in self.unset:
            self.get_parameter(name).data.copy_(ends[name])
        self.unset = set()

    @property
    def draft_token_ids(self) -> Int[Tensor, "draft_vocab"] | None:
        """Verifier ids of the draft's tokens; None where the vocabulary is the verifier's."""
        if self.config.draft_vocab_size == self.config.transformer_layer_config.vocab_size:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    # ---- the network ----

    def combine(
        self, hidden_states: Float[Tensor, "batch seq aux_hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """The aux states of each token as one state."""
        if self.input_norm is not None:
            hidden_states = self.input_norm(hidden_states)
        if self.fc_norm is not None:
            chunks = hidden_states.chunk(len(self.fc_norm), dim=-1)
            hidden_states = torch.cat(
                [norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1
            )
        return self.fc(hidden_states)

    def backbone(
        self,
        token_ids: Int[Tensor, "batch seq"],
        hidden: Float[Tensor, "batch seq hidden"],
        position_ids: Int[Tensor, "batch seq"],
        attend: Attend,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch seq hidden"]]:
        """One step of the draft: the state that the head reads, and the one that is fed back."""
        rotary = self.rotary_emb(hidden, position_ids)
        first, *others = self.layers
        hidden = first(self.embed_tokens(token_ids), hidden, rotary, attend)
        for index, layer in enumerate(others, start=1):
            hidden = decoder_layer(layer, index, hidden, rotary, attend)
        normed = self.norm(hidden)
        return normed, normed if self.config.norm_output else hidden

    # ---- training ----

    def unroll(self, batch: Batch, num_steps: int) -> Iterator[Float[Tensor, "batch rows hidden"]]:
        """The state that the head reads, step by step; step k has ``seq - 1 - k`` rows.

        Row i of step k predicts token i + 2 + k. Tokens are the true ones throughout.
        """
        hidden = self.combine(batch.hidden_states[:, :-1])
        attend = UnrolledAttention(self.config.transformer_layer_config, batch.document_ids[:, :-1])
        for step in range(min(num_steps, batch.input_ids.shape[1] - 1)):
            tokens = batch.input_ids[:, 1 + step :]
            num_rows = tokens.shape[1]
            positions = batch.position_ids[:, :num_rows] + step
            output, hidden = self.backbone(tokens, hidden[:, :num_rows], positions, attend)
            yield output

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
        head, token_ids = self.verifier_head, self.draft_token_ids
        documents = batch.document_ids
        draft_tokens = torch.full(
            (objective.ttt_steps, *documents.shape), -1, device=documents.device
        )
        total = batch.hidden_states.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        right_so_far = torch.ones_like(batch.loss_mask)
        for step, output in enumerate(self.unroll(batch, objective.ttt_steps)):
            num_rows = output.shape[1]
            reads = slice(1 + step, 1 + step + num_rows)
            trained = batch.loss_mask[:, reads] & (documents[:, :num_rows] != PADDING)
            trained &= documents[:, reads] == documents[:, :num_rows]
            logits = self.lm_head(output[trained])  # [trained, draft_vocab]
            with torch.no_grad():
                targets = head(batch.last_hidden_states[:, reads][trained], token_ids)
            num_trained = trained.sum()
            loss = weighted_loss(objective.loss, logits, targets).sum() / (
                num_trained + MASK_SUM_FLOOR
            )
            total = total + objective.ttt_step_loss_decay**step * loss

            chosen = logits.argmax(-1)
            draft_tokens[step, :, :num_rows][trained] = chosen
            right = torch.zeros_like(trained)
            right[trained] = chosen == targets.argmax(-1)
            reached = trained & right_so_far[:, :num_rows]
            right_so_far = reached & right
            metrics[f"loss_{step}"] = loss.detach()
            metrics[f"full_acc_{step}"] = right_so_far.sum() / num_trained.clamp_min(1)
            metrics[f"cond_acc_{step}"] = right_so_far.sum() / reached.sum().clamp_min(1)
        return draft_tokens, total, metrics

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """``kwargs`` are fields of `Eagle3Objective`.

        Raises:
            SpeculatorError: a field is unknown or out of bounds.
        """
        try:
            objective = Eagle3Objective.model_validate(kwargs)
        except ValidationError as error:
            raise SpeculatorError(f"get_trainer_kwargs: {first_fault(error)}") from error
        return {"objective": objective}, {"objective": objective}

    # ---- decoding ----

    def start_drafting(self) -> Eagle3State:
        return Eagle3State(DynamicCache())

    @torch.no_grad()
    def propose(
        self,
        state: Eagle3State,
        next_tokens: Int[Tensor, "batch new"],
        hidden_states: Float[Tensor, "batch new aux_hidden"],
        num_tokens: int,
    ) -> Int[Tensor, "batch draft"]:
        hidden = self.combine(hidden_states)
        tokens, past = next_tokens, state.length
        state.length += next_tokens.shape[1]
        proposed: list[Tensor] = []
        while True:
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
            attend = cached_attend(self.config.transformer_layer_config, state.cache, past)
            output, hidden = self.backbone(tokens, hidden, positions, attend)
            past += tokens.shape[1]
            chosen = self.lm_head(output[:, -1]).argmax(-1)  # [batch]
            if (token_ids := self.draft_token_ids) is not None:
                chosen = token_ids[chosen]
            proposed.append(chosen)
            if len(proposed) == num_tokens:
                if past > state.length:
                    state.cache.crop(state.length - past)
                return torch.stack(proposed, dim=1)
            tokens, hidden = chosen[:, None], hidden[:, -1:]


def eagle3_config(
    verifier_config: PretrainedConfig,
    recipe: Eagle3Recipe,
    d2t: Tensor | None = None,
    name_or_path: str | None = None,
) -> Eagle3SpeculatorConfig:
    """The config of a fresh draft; everything that the recipe leaves open is the verifier's."""
    text = verifier_config.get_text_config()
    layer_ids = list(recipe.aux_layer_ids or default_aux_layer_ids(text.num_hidden_layers))
    shape: dict[str, Any] = {
        key: getattr(text, key)
        for key in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "initializer_range",
        )
    }
    head_dim = getattr(text, "head_dim", None)
    kind = "full_attention" if recipe.sliding_window is None else "sliding_attention"
    layer_config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[recipe.layer_type](
        **shape,
        layer_types=[kind] * recipe.num_layers,
        sliding_window=recipe.sliding_window,
        use_sliding_window=recipe.sliding_window is not None,
        head_dim=head_dim or text.hidden_size // text.num_attention_heads,
        intermediate_size=recipe.intermediate_size or text.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        rope_parameters=_plain_rope(text),
        hidden_act="silu",
        tie_word_embeddings=False,
    )
    # Of our own: by it a verifier of another depth is refused.
    layer_config.verifier_num_hidden_layers = text.num_hidden_layers
    return Eagle3SpeculatorConfig(
        transformer_layer_config=layer_config,
        draft_vocab_size=text.vocab_size if d2t is None else len(d2t),
        norm_before_residual=recipe.norm_before_residual,
        norm_before_fc=recipe.norm_before_fc,
        fc_norm=recipe.fc_norm,
        norm_output=recipe.norm_output,
        eagle_aux_hidden_state_layer_ids=layer_ids,
        embed_requires_grad=recipe.embed_requires_grad,
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[
                GreedyTokenProposalConfig(speculative_tokens=recipe.speculative_tokens)
            ],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_config(
                verifier_config, name_or_path or _absolute(verifier_config.name_or_path)
            ),
        ),
    )


def _absolute(name: str) -> str | None:
    """A local folder in full, as a relative one would be meant from the speculator's folder."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


def _plain_rope(text: PretrainedConfig) -> dict[str, Any]:
    """The verifier's rotary embedding for layers of one kind that rotate whole heads.

    Raises:
        SpeculatorError: it has sections (multimodal positions), which these layers cannot follow.
    """
    rope = dict(text.rope_parameters)
    if "rope_type" not in rope:  # one for each kind of layer
        rope = dict(rope.get("sliding_attention") or next(iter(rope.values())))
    if "mrope_section" in rope:
        raise SpeculatorError(
            "the verifier's rotary embedding has mrope sections: no draft for it."
        )
    return {k: v for k, v in rope.items() if k not in ("type", "partial_rotary_factor")}
