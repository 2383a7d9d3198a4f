"""What drafts that read aux hidden states share."""

import itertools
import logging
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import Field, JsonValue
from torch import Tensor, nn
from transformers import PretrainedConfig

from speculators_core.decoding.drafter import Chooser, Proposal
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators_core.format.proposals import GreedyTokenProposalConfig
from speculators_core.format.readings import OtherReading
from speculators_core.format.vocabulary import Vocabulary, check_vocabulary
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.settings import Settings
from speculators_core.verifier.mask_token import choose_mask_token
from speculators_core.verifier.reading import read_tokenizer
from speculators_core.verifier.sizes import Sizes, layer_sizes, required_size
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
            depth = required_size(verifier, "num_hidden_layers")
            self._default_aux_layer_ids = default_aux_layer_ids(depth)

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


class MaskRecipe(Settings):
    """The mask token of a draft that reads one."""

    mask_token_id: int | None = Field(None, ge=0)
    """Token in place of those not known yet; if not set the tokenizer's mask, or a reserved or
    added token that texts do not hold."""


Masked = TypeVar("Masked", bound=MaskRecipe)


def with_mask_token(
    recipe: Masked, verifier_config: PretrainedConfig
) -> tuple[Masked, tuple[str, ...]]:
    """The recipe with a mask token, and which one was chosen where it states none.

    Raises:
        SpeculatorError: it states none, and the verifier's tokenizer cannot be read or has none.
    """
    if recipe.mask_token_id is not None:
        return recipe, ()
    name = verifier_config.name_or_path
    if not name:
        raise SpeculatorError(
            "mask_token_id is missing, and the verifier's config does not say where its tokenizer "
            "is. Set mask_token_id to a token that texts do not hold."
        )
    vocab_size = required_size(verifier_config.get_text_config(), "vocab_size")
    # Whoever has a config of the checkpoint's own class has trusted its code.
    is_trusted = type(verifier_config).__module__.startswith("transformers_modules.")
    chosen = choose_mask_token(read_tokenizer(name, is_trusted), vocab_size)
    return recipe.model_copy(update={"mask_token_id": chosen.token_id}), (str(chosen),)


class DraftRecipe(Settings):
    """The shape of a fresh draft, as far as its verifier leaves it open."""

    layer_type: Literal["llama", "qwen3"] = "llama"
    """Architecture of the draft's layers."""
    num_layers: int = Field(1, ge=1)
    """Draft layers."""
    num_attention_heads: int | None = Field(None, ge=1)
    """Query heads; the verifier's where None, or as many as divide its width."""
    num_key_value_heads: int | None = Field(None, ge=1)
    """Key and value heads; the verifier's where None."""
    head_dim: int | None = Field(None, ge=2, multiple_of=2)
    """Width of a head; the verifier's where None."""
    intermediate_size: int | None = Field(None, ge=1)
    """MLP width; the verifier's dense one where None, or three times its hidden size."""
    max_position_embeddings: int | None = Field(None, ge=1)
    """Positions; the verifier's where None."""
    rms_norm_eps: float | None = Field(None, gt=0)
    """Epsilon of the norms; the verifier's where None."""
    rope_parameters: dict[str, JsonValue] | None = None
    """Rotary embedding, as in a Transformers config; the verifier's for whole heads where None."""
    sliding_window: int | None = Field(None, ge=1)
    """Tokens that a token attends to, itself included; all where None."""
    aux_layer_ids: tuple[int, ...] | None = None
    """Verifier layers to read, ascending; the paper's three where None."""

    @property
    def sizes(self) -> Sizes:
        """The stated sizes of a layer, as keys of ``transformer_layer_config``."""
        return {key: value for key in SIZES if (value := getattr(self, key)) is not None}


SIZES = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
)
"""Fields of a recipe that replace the verifier's sizes."""


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


def draft_layer_config(
    verifier_config: PretrainedConfig, recipe: DraftRecipe
) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """The draft's layers, and the sizes that neither the recipe nor the verifier states.

    Raises:
        SpeculatorError: the sizes make no layer.
    """
    text = verifier_config.get_text_config()
    sizes = layer_sizes(text, recipe.sizes)
    kind = "full_attention" if recipe.sliding_window is None else "sliding_attention"
    layer_config = SpeculatorModelConfig.validate_transformer_config(
        {
            "model_type": recipe.layer_type,
            **sizes.values,
            "layer_types": [kind] * recipe.num_layers,
            "sliding_window": recipe.sliding_window,
            "use_sliding_window": recipe.sliding_window is not None,
            "num_hidden_layers": recipe.num_layers,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }
    )
    # Our key, not Transformers': a verifier of another depth is refused by it.
    layer_config.verifier_num_hidden_layers = required_size(text, "num_hidden_layers")
    return layer_config, sizes.guesses


def recipe_layer_ids(verifier_config: PretrainedConfig, recipe: DraftRecipe) -> list[int]:
    depth = required_size(verifier_config.get_text_config(), "num_hidden_layers")
    return list(recipe.aux_layer_ids or default_aux_layer_ids(depth))


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
