"""The network that EAGLE-3 and P-EAGLE share.

Aux states and embeddings pass one stack. The first layer reads embedding and hidden state side by
side; the others are ordinary.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PretrainedConfig

from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.format.readings import OtherReading
from speculators_core.format.schema import own_fields
from speculators_core.models.feature_draft import (
    AuxLayerIds,
    DraftRecipe,
    FeatureDraftConfig,
    FeatureDraftModel,
    draft_layer_config,
    recipe_layer_ids,
    speculators_config,
)
from speculators_core.models.parts.attention import Attend
from speculators_core.models.parts.layers import InputLayer, decoder_layer, family_of
from speculators_core.verifier.taps import DEFAULT_NUM_AUX

LAYER_TYPES = ("llama", "qwen3")
"""Those that vLLM has this network for."""
EXCLUSIVE_NORMS = ("norm_before_fc", "fc_norm")
"""Options of which at most one is on."""


class EagleStackConfig(FeatureDraftConfig):
    """The keys of the shared network. Defaults are those of readers that leave a key out."""

    layer_ids_key: ClassVar[str] = "eagle_aux_hidden_state_layer_ids"

    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    eagle_aux_hidden_state_layer_ids: AuxLayerIds | None = None
    embed_requires_grad: bool = False

    @property
    def stated_layer_ids(self) -> list[int] | None:
        return self.eagle_aux_hidden_state_layer_ids

    @property
    def norm_options(self) -> dict[str, bool]:
        return {
            "norm_before_residual": self.norm_before_residual,
            "norm_before_fc": self.norm_before_fc,
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
        }

    def other_readings(self, verifier: PretrainedConfig) -> Iterator[OtherReading]:
        """Each norm option the other way; a norm without stored weights scales by one."""
        for option, value in self.norm_options.items():
            changes = {option: not value}
            if not value and option in EXCLUSIVE_NORMS:
                changes = {other: other == option for other in EXCLUSIVE_NORMS}
            description = f"{option} {str(not value).lower()} instead of {str(value).lower()}"
            yield OtherReading("missing norm", description, changes)
        yield from super().other_readings(verifier)

    def check(self) -> None:
        super().check()
        layer_config = self.transformer_layer_config
        family_of(layer_config, LAYER_TYPES)
        if self.norm_before_fc and self.fc_norm:
            raise SpeculatorError(
                "norm_before_fc and fc_norm are both true, but exclude each other. Set one to "
                "false, as the draft was trained."
            )
        # vLLM sizes the fc of a llama draft by this key, not by the ids.
        stated = getattr(layer_config, "num_aux_hidden_states", self.num_aux)
        if stated != self.num_aux:
            raise SpeculatorError(
                f"transformer_layer_config.num_aux_hidden_states is {stated}, but there are "
                f"{self.num_aux} aux layer ids ({self.stated_layer_ids}); expected equal numbers. "
                "Correct num_aux_hidden_states, or the ids.",
                cause="wrong layer ids",
            )
        if self.num_aux != DEFAULT_NUM_AUX:
            layer_config.num_aux_hidden_states = self.num_aux


class EagleStackRecipe(DraftRecipe):
    """The options of the shared network that a fresh draft may choose."""

    norm_before_residual: bool = True
    """Take the normed hidden state as the first layer's residual."""
    norm_before_fc: bool = True
    """Norm all aux states together."""
    fc_norm: bool = False
    """Norm each aux state by itself."""
    speculative_tokens: int = Field(ge=1)
    """Tokens proposed in one step."""


class EagleStackModel(FeatureDraftModel):
    """Embeddings, fc, one or more layers, norm and head."""

    config: EagleStackConfig

    def __init__(self, config: EagleStackConfig, verifier=None, verifier_attachment_mode=None):  # type: ignore[no-untyped-def]  # as in the base
        super().__init__(config, verifier, verifier_attachment_mode)
        self.make_stack()
        self.post_init()
        # The head stays the verifier's; so do the embeddings unless they are to train.
        self.embed_tokens.requires_grad_(config.embed_requires_grad)
        self.lm_head.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @classmethod
    def fresh_config(
        cls,
        verifier_config: PretrainedConfig,
        recipe: EagleStackRecipe,
        draft_vocab_size: int,
        name_or_path: str | None,
    ) -> SpeculatorModelConfig:
        """Options of the recipe that are keys of the config keep their names."""
        config_class = cls.config_class
        layer_config, guesses = draft_layer_config(verifier_config, recipe)
        config = config_class(
            **recipe.model_dump(include=set(own_fields(config_class))),
            transformer_layer_config=layer_config,
            draft_vocab_size=draft_vocab_size,
            eagle_aux_hidden_state_layer_ids=recipe_layer_ids(verifier_config, recipe),
            speculators_config=speculators_config(
                config_class.speculators_model_type,
                recipe.speculative_tokens,
                verifier_config,
                name_or_path,
            ),
        )
        config.guesses = guesses
        return config

    def make_stack(self) -> None:
        """All modules; an algorithm adds its own."""
        config = self.config
        layer_config = config.transformer_layer_config
        family = family_of(layer_config, LAYER_TYPES)
        hidden, norm_eps = layer_config.hidden_size, layer_config.rms_norm_eps
        self.embed_tokens = nn.Embedding(layer_config.vocab_size, hidden)
        self.fc = self.make_fc()
        aux_hidden = self.fc.in_features // config.num_aux
        self.input_norm = (
            family.norm(self.fc.in_features, eps=norm_eps) if config.norm_before_fc else None
        )
        self.fc_norm = (
            nn.ModuleList(family.norm(aux_hidden, eps=norm_eps) for _ in range(config.num_aux))
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
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size or 0, bias=False)
        self.rotary_emb = family.rotary(layer_config)
        self.make_vocabulary()

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
        """One pass: the states that the head reads, and those before the last norm."""
        rotary = self.rotary_emb(hidden, position_ids)
        first, *others = self.layers
        hidden = first(self.embed_tokens(token_ids), hidden, rotary, attend)
        for index, layer in enumerate(others, start=1):
            hidden = decoder_layer(layer, index, hidden, rotary, attend)
        return self.norm(hidden), hidden
