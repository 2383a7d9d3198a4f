"""What drafts that read aux hidden states share."""

import itertools
import logging
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from speculators_core.decoding.drafter import Chooser, Proposal
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators_core.format.proposals import GreedyTokenProposalConfig
from speculators_core.format.readings import OtherReading
from speculators_core.format.vocabulary import Vocabulary, check_vocabulary
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.settings import Settings
from speculators_core.verifier.taps import DEFAULT_NUM_AUX, default_aux_layer_ids

logger = logging.getLogger(__name__)

AuxLayerIds = list[Annotated[int, Field(ge=0)]]
MAX_PERMUTED = 4
"""Aux layers whose other orders are tried in a diagnosis."""


class FeatureDraftConfig(SpeculatorModelConfig):
    """Keys of every draft that reads aux hidden states. Defaults are those of readers."""

    layer_ids_key: ClassVar[str]

    draft_vocab_size: Annotated[int, Field(ge=1)] | None = 32_000
    target_hidden_size: Annotated[int, Field(ge=1)] | None = None

    @property
    def stated_layer_ids(self) -> list[int] | None:
        """The aux layer ids that the config has, under whatever key."""
        raise NotImplementedError

    @classmethod
    def normalize(cls, read: dict[str, Any]) -> None:
        super().normalize(read)
        ids = read.get(cls.layer_ids_key)
        if not isinstance(ids, list) or not all(isinstance(layer_id, int) for layer_id in ids):
            return
        if ids != sorted(set(ids)):
            logger.warning(
                "aux layer ids %s were taken for %s, as vLLM takes them", ids, sorted(set(ids))
            )
        read[cls.layer_ids_key] = sorted(set(ids)) or None

    def check(self) -> None:
        ids = self.stated_layer_ids
        if ids is not None and (not ids or ids != sorted(set(ids))):
            raise SpeculatorError(
                f"aux layer ids are {ids}, expected ascending and unique: vLLM sorts them, and fc "
                "would read its inputs in another order. Restore the order of training.",
                cause="wrong layer ids",
            )
        vocab_size = self.transformer_layer_config.vocab_size
        if self.draft_vocab_size is None:
            self.draft_vocab_size = vocab_size
        if self.draft_vocab_size > vocab_size:
            raise SpeculatorError(
                f"draft_vocab_size is {self.draft_vocab_size}, expected at most {vocab_size}, the "
                "verifier's vocabulary. Correct draft_vocab_size, or vocab_size of "
                "transformer_layer_config."
            )

    @property
    def vocabulary(self) -> Vocabulary:
        vocab_size = self.transformer_layer_config.vocab_size
        return Vocabulary(self.draft_vocab_size or vocab_size, vocab_size)

    @property
    def verifier_hidden_size(self) -> int:
        return self.target_hidden_size or super().verifier_hidden_size

    @property
    def num_aux(self) -> int:
        return len(self.stated_layer_ids or range(DEFAULT_NUM_AUX))

    def settle(self, verifier: PretrainedConfig) -> None:
        if self.stated_layer_ids is None:
            self._default_aux_layer_ids = default_aux_layer_ids(verifier.num_hidden_layers)

    @property
    def aux_layer_ids(self) -> list[int]:
        """Layers whose states the draft reads, ascending; the paper's where the config has none.

        Raises:
            SpeculatorError: the config has none, and the verifier's depth is not known yet.
        """
        if self.stated_layer_ids is not None:
            return self.stated_layer_ids
        if not hasattr(self, "_default_aux_layer_ids"):
            raise SpeculatorError(
                "the config has no aux layer ids, so the verifier's depth decides; expected an "
                "attached verifier. Call attach_verifier first."
            )
        return self._default_aux_layer_ids

    def other_readings(self, verifier: PretrainedConfig) -> Iterator[OtherReading]:
        """Neighbouring layer ids, the usual ones, and the same ones in another order."""
        own, depth = tuple(self.aux_layer_ids), verifier.num_hidden_layers
        others = [tuple(layer_id + by for layer_id in own) for by in (-1, 1)]
        if len(own) <= MAX_PERMUTED:
            others += itertools.permutations(own)
        try:
            usual = default_aux_layer_ids(depth)
            others += [tuple(layer_id + by for layer_id in usual) for by in (0, -1, 1)]
        except SpeculatorError:
            pass  # the verifier is too shallow to have usual ids
        for ids in dict.fromkeys(others):
            fits = len(ids) == len(own) and all(0 <= layer_id <= depth for layer_id in ids)
            if fits and ids != own:
                description = f"aux layer ids {list(ids)} instead of {list(own)}"
                yield OtherReading("wrong layer ids", description, layer_ids=ids)
        yield from super().other_readings(verifier)


def check_mask_token(mask_token_id: int | None, vocab_size: int, who: str) -> None:
    """Raises SpeculatorError unless it is a token of the vocabulary; ``who`` reads it."""
    if mask_token_id is None:
        raise SpeculatorError(
            f"mask_token_id is missing in the config: {who} needs it. Add the id of the mask token "
            "that the draft was trained with, which no text contains."
        )
    if mask_token_id >= vocab_size:
        raise SpeculatorError(
            f"mask_token_id {mask_token_id} is not in the vocabulary: expected 0 to "
            f"{vocab_size - 1}. Set the id that the draft was trained with."
        )


class DraftRecipe(Settings):
    """The shape of a fresh draft, as far as its verifier leaves it open."""

    layer_type: Literal["llama", "qwen3"] = "llama"
    """Architecture of the draft's layers."""
    num_layers: int = Field(1, ge=1)
    """Draft layers."""
    intermediate_size: int | None = Field(None, ge=1)
    """MLP width; the verifier's where None."""
    sliding_window: int | None = Field(None, ge=1)
    """Tokens that a token attends to, itself included; all where None."""
    aux_layer_ids: tuple[int, ...] | None = None
    """Verifier layers to read, ascending; the paper's three where None."""


class FeatureDraftModel(SpeculatorModel):
    """A draft with an fc over aux states and, where it drafts in one, a reduced vocabulary."""

    config: FeatureDraftConfig
    d2t: Tensor
    t2d: Tensor
    fc: nn.Linear

    vocabulary_weights: ClassVar[tuple[str, ...]] = ("embed_tokens.weight", "lm_head.weight")
    """Copies of the verifier's embeddings and head that this algorithm's checkpoints hold."""
    aliases: ClassVar[Mapping[str, str]] = {"midlayer.": "layers.0."}
    unneeded: ClassVar[tuple[str, ...]] = ("t2d",)  # vLLM skips it beside a whole vocabulary

    def make_vocabulary(self) -> None:
        """The maps between the two vocabularies, where they differ."""
        config = self.config
        if not config.vocabulary.is_whole:
            assert config.draft_vocab_size is not None
            vocab_size = config.transformer_layer_config.vocab_size
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(vocab_size, dtype=torch.bool))

    def make_fc(self) -> nn.Linear:
        hidden = self.config.transformer_layer_config.hidden_size
        aux_hidden = self.config.num_aux * self.config.verifier_hidden_size
        return nn.Linear(aux_hidden, hidden, bias=False)

    def start_fresh(self, t2d: Tensor | None, d2t: Tensor | None) -> None:
        if (t2d is None) != (d2t is None):
            raise SpeculatorError(
                f"{'t2d' if t2d is None else 'd2t'} is missing; expected both or neither. Pass t2d "
                "and d2t together."
            )
        if t2d is not None and d2t is not None:
            vocab_size = self.config.transformer_layer_config.vocab_size
            if len(t2d) != vocab_size:
                raise SpeculatorError(
                    f"t2d has {len(t2d)} entries; expected one for each of the verifier's "
                    f"{vocab_size} tokens. Make it for this verifier."
                )
            check_vocabulary(t2d, d2t)
            if not self.config.vocabulary.is_whole:
                self.t2d.copy_(t2d)
                self.d2t.copy_(d2t)
        self.unset = {name for name in self.vocabulary_weights if name in self.state_dict()}

    @property
    def from_verifier(self) -> tuple[str, ...]:
        """With a reduced vocabulary the head is always stored: vLLM would take the whole one."""
        whole = self.config.vocabulary.is_whole
        return tuple(name for name in self.vocabulary_weights if whole or name != "lm_head.weight")

    @property
    def optional(self) -> tuple[str, ...]:
        """t2d follows from d2t, and vLLM reads d2t alone."""
        return (*self.from_verifier, "t2d")

    @staticmethod
    def check_tensors(tensors: Mapping[str, Tensor]) -> None:
        if "t2d" in tensors and "d2t" in tensors:
            check_vocabulary(tensors["t2d"], tensors["d2t"])

    def check_shapes(self, found: Mapping[str, tuple[int, ...]], where: str | PathLike) -> None:
        shape, width = found.get("fc.weight", ()), self.config.verifier_hidden_size
        num_aux = self.config.num_aux
        if len(shape) == 2 and shape[1] % width == 0 and shape[1] != num_aux * width:
            raise SpeculatorError(
                f"{where}: fc.weight has shape {list(shape)}, for {shape[1] // width} aux hidden "
                f"states, but the config has {num_aux} aux layer ids "
                f"({self.config.stated_layer_ids}). Write the ids that it was trained with.",
                cause="wrong layer ids",
            )

    def differing_ends(self) -> list[str]:
        """Embeddings and head of the draft that are not its verifier's, which is attached."""
        ends = self._verifiers_ends()
        own = {
            "embed_tokens.weight": self.get_input_embeddings(),
            "lm_head.weight": self.get_output_embeddings(),
        }
        return [
            name
            for name, module in own.items()
            if module is not None
            and not torch.equal(module.weight.data, ends[name].to(self.device, self.dtype))
        ]

    def _verifiers_ends(self) -> dict[str, Tensor]:
        """The attached verifier's embeddings, and the rows of its head that the draft has."""
        head, token_ids = self.verifier_head, self.draft_token_ids
        rows = slice(None) if token_ids is None else token_ids.to(head.lm_head.weight.device)
        return {
            "embed_tokens.weight": head.embed_tokens.weight.data,
            "lm_head.weight": head.lm_head.weight.data[rows],
        }

    def fill_unset(self) -> None:
        if "t2d" in self.unset:
            self.t2d[self.draft_token_ids] = True
            self.unset.discard("t2d")
        if not self.unset or self.attached is None:
            return
        ends = self._verifiers_ends()
        for name in self.unset:
            self.get_parameter(name).data.copy_(ends[name])
        self.unset = set()

    @property
    def draft_token_ids(self) -> Int[Tensor, "draft_vocab"] | None:
        """Verifier ids of the draft's tokens; None where the vocabulary is the verifier's."""
        if self.config.vocabulary.is_whole:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def choose(
        self, logits: Float[Tensor, "batch tokens draft_vocab"], choose: Chooser
    ) -> Proposal:
        """Tokens of the verifier's vocabulary from logits over the draft's."""
        vocab_size = self.config.transformer_layer_config.vocab_size
        return choose(logits, self.draft_token_ids, vocab_size)


# ---- the config of a fresh draft ----

FROM_VERIFIER = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
)


def draft_layer_config(verifier_config: PretrainedConfig, recipe: DraftRecipe) -> PretrainedConfig:
    """The draft's layers; where the recipe leaves a value open it is the verifier's."""
    text = verifier_config.get_text_config()
    shape = {key: getattr(text, key) for key in FROM_VERIFIER}
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
    # Our key, not Transformers': a verifier of another depth is refused by it.
    layer_config.verifier_num_hidden_layers = text.num_hidden_layers
    return layer_config


def recipe_layer_ids(verifier_config: PretrainedConfig, recipe: DraftRecipe) -> list[int]:
    text = verifier_config.get_text_config()
    return list(recipe.aux_layer_ids or default_aux_layer_ids(text.num_hidden_layers))


def speculators_config(
    algorithm: str,
    speculative_tokens: int,
    verifier_config: PretrainedConfig,
    name_or_path: str | None,
) -> SpeculatorsConfig:
    """Greedy proposals for this verifier, which the checkpoint calls ``name_or_path``."""
    name = name_or_path or _absolute(verifier_config.name_or_path)
    return SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=speculative_tokens)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_config(verifier_config, name),
    )


def _absolute(name: str) -> str | None:
    """The full path of a local folder: a relative one would start at the speculator's folder."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


def _plain_rope(text: PretrainedConfig) -> dict[str, object]:
    """The verifier's rotary embedding for layers of one kind that rotate whole heads.

    Raises:
        SpeculatorError: it has sections (multimodal positions), which these layers cannot follow.
    """
    rope = dict(text.rope_parameters)
    if "rope_type" not in rope:  # one for each kind of layer
        rope = dict(rope.get("sliding_attention") or next(iter(rope.values())))
    if "mrope_section" in rope:
        raise SpeculatorError(
            "the verifier's rope_parameters have an mrope_section, expected a rotary embedding "
            "without sections. Choose a text-only verifier."
        )
    return {k: v for k, v in rope.items() if k not in ("type", "partial_rotary_factor")}
