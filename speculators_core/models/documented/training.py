"""Training arguments under the names of the public documents."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import PretrainedConfig

from speculators_core.errors import SpeculatorError
from speculators_core.format.documented import TRAINING_KEYS
from speculators_core.settings import Settings
from speculators_core.verifier.reading import read_verifier_config

Options = dict[str, Any]
"""Arguments of a call by name."""
VERIFIER = "verifier_name_or_path"
"""The argument that marks a call in the documents' form."""
RECIPE = {
    "": {"target_layer_ids": "aux_layer_ids"},
    "eagle3": {"ttt_steps": "speculative_tokens"},
    "peagle": {"num_depths": "speculative_tokens"},
    "mtp": {"num_speculative_steps": "speculative_tokens"},
}
"""Documented names of a recipe's fields, of every algorithm and of each."""
RECIPE_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "eagle3": {"norm_before_fc": False, "norm_output": False},
    "peagle": {"norm_before_residual": False, "norm_before_fc": False, "embed_requires_grad": True},
    "dflash": {"block_size": 8},
}
"""Values of a call in the documents' form that leaves them out."""
OBJECTIVE = {
    "": {"loss_fn": "loss"},
    "dflash": {"dflash_decay_gamma": "decay_length", "gamma": "decay_length"},
    "mtp": {"num_speculative_steps": "num_steps", "step_weight_beta": "step_decay"},
}
"""Documented names of an objective's fields, of every algorithm and of each."""
OF_ANY_ALGORITHM = frozenset(
    "aux_layer_ids num_layers norm_before_residual norm_before_fc fc_norm norm_output "
    "embed_requires_grad block_size mask_token_id sliding_window_non_causal ttt_steps "
    "ttt_step_loss_decay max_anchors num_depths down_sample_ratio down_sample_ratio_min "
    "num_speculative_steps step_weight_beta "
    "step_weights dflash_decay_gamma loss_fn use_off_policy_tokens".split()
)
"""Arguments that a training script passes to every algorithm, and each takes its own from."""


@dataclass(frozen=True)
class TrainingArguments:
    """What `from_training_args` was called with, under our names."""

    recipe: Options
    verifier_config: PretrainedConfig
    verifier: str | None = None
    """The verifier whose embeddings and head the draft takes."""
    layer_config: PretrainedConfig | None = None
    """The draft's layers as the caller shaped them."""
    config_keys: Options = field(default_factory=dict)
    """Options of the loss that the config states."""

    @classmethod
    def read(
        cls,
        kind: str,
        recipe_class: type[Settings],
        verifier_config: PretrainedConfig,
        draft_vocab_size: int,
        arguments: Options,
    ) -> "TrainingArguments":
        """Translates a call; one in our form stays as it is.

        Args:
            kind: ``speculators_model_type``.
            draft_vocab_size: what the vocabulary maps make of it.

        Raises:
            SpeculatorError: two arguments contradict each other, or one is not supported.
        """
        given = dict(arguments)
        stated_size = given.pop("draft_vocab_size", None)
        if stated_size not in (None, draft_vocab_size):
            raise SpeculatorError(
                f"draft_vocab_size {stated_size} contradicts t2d and d2t, which make it "
                f"{draft_vocab_size}. Pass maps of that many tokens, or leave it out."
            )
        given.pop("draft_attn_impl", None)  # every kind gives the numbers of our one attention
        known = {key: given[key] for key in TRAINING_KEYS.get(kind, ()) if key in given}
        verifier = given.pop(VERIFIER, None)
        fields = recipe_class.model_fields
        if "sliding_window_non_causal" in given and "causal" in fields:
            is_windowed = "sliding_attention" in (getattr(verifier_config, "layer_types", ()) or ())
            is_windowed |= given.get("sliding_window") is not None
            is_causal = not given.pop("sliding_window_non_causal")
            given["causal"] = is_causal and is_windowed  # full attention sees its whole block
        recipe = _renamed(given, RECIPE, kind)
        for key in known:
            recipe.pop(key, None)
        if verifier is None:
            return cls(recipe, verifier_config, config_keys=known)
        recipe = {
            key: value
            for key, value in recipe.items()
            if key in fields or key not in OF_ANY_ALGORITHM
        }
        recipe = {**RECIPE_DEFAULTS.get(kind, {}), **recipe}
        own_config = read_verifier_config(verifier, bool(recipe.pop("trust_remote_code", False)))
        if "num_layers" not in fields:
            return cls(recipe, own_config, str(verifier), None, known)
        layers = copy.deepcopy(verifier_config.get_text_config())
        layers.num_hidden_layers = recipe.setdefault("num_layers", layers.num_hidden_layers)
        kinds = getattr(layers, "layer_types", None) or ["full_attention"]
        layers.layer_types = kinds[:1] * layers.num_hidden_layers
        recipe.setdefault("intermediate_size", layers.intermediate_size)
        if layers.model_type not in get_args(fields["layer_type"].annotation):
            return cls(recipe, own_config, str(verifier), None, known)
        recipe.setdefault("layer_type", layers.model_type)
        return cls(recipe, own_config, str(verifier), layers, known)

    def shape(self, config: Any) -> None:
        """Gives a fresh config the caller's layers and its options of the loss."""
        if self.layer_config is not None:
            self.layer_config.tie_word_embeddings = False
            made = config.transformer_layer_config
            self.layer_config.verifier_num_hidden_layers = made.verifier_num_hidden_layers
            config.transformer_layer_config = self.layer_config
            config.check()
        for key, value in self.config_keys.items():
            setattr(config, key, value)


def objective_options(kind: str, objective_class: type[Settings], arguments: Options) -> Options:
    """Fields of an objective from arguments under either name.

    Raises:
        SpeculatorError: two arguments are one option.
    """
    given = dict(arguments)
    if kind == "mtp" and given.get("step_weights") is not None:
        given.pop("step_weight_beta", None)  # weights that are given replace computed ones
        if not given.keys() & {"num_steps", "num_speculative_steps"}:
            given["num_steps"] = len(given["step_weights"])
    options = _renamed(given, OBJECTIVE, kind)
    is_documented = given.keys() - options.keys() or "use_off_policy_tokens" in arguments
    return _without_foreign(options, objective_class) if is_documented else options


def _without_foreign(options: Mapping[str, object], fields_of: type[Settings]) -> Options:
    """The options without those that belong to other algorithms."""
    fields = fields_of.model_fields
    return {k: value for k, value in options.items() if k in fields or k not in OF_ANY_ALGORITHM}


def _renamed(
    given: Mapping[str, object], names: Mapping[str, Mapping[str, str]], kind: str
) -> Options:
    """The arguments under our names; None, where the documents allow it, is left out."""
    ours = {**names[""], **names.get(kind, {})}
    renamed = {}
    for key, value in given.items():
        name = ours.get(key, key)
        if name in renamed or (name != key and name in given):
            raise SpeculatorError(f"{key} and {name} are two names of one option. Pass one.")
        if key not in ours or value is not None:
            renamed[name] = value
    return renamed
