"""vLLM's config of a draft, made from a speculator's.

vLLM sends it to its processes by the name of its class, before it loads plug-ins: the class must
be importable from this module.
"""

from collections.abc import Mapping
from os import PathLike

from pydantic import JsonValue
from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

from speculators_core.errors import SpeculatorError
from speculators_vllm.plugin.proposers import PROPOSERS, Proposer


def proposer_of(config_dict: Mapping[str, JsonValue]) -> Proposer | None:
    """Ours or another package's for this kind of speculator; None where there is none."""
    kind = config_dict.get("speculators_model_type")
    return PROPOSERS.load(kind) if kind in PROPOSERS.names() else None


class DraftConfig(SpeculatorsConfig):
    """Asks the algorithm's `Proposer` first; what has none is read as vLLM reads it."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: object
    ) -> "DraftConfig":
        config = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if getattr(config, "speculative_method", None) == "mtp":
            config.model_type = "mtp"  # by which vLLM knows that the method fits the draft
        return config

    @classmethod
    def extract_transformers_pre_trained_config(
        cls, config_dict: dict[str, JsonValue]
    ) -> dict[str, JsonValue]:
        proposer = proposer_of(config_dict)
        if proposer is None:
            return super().extract_transformers_pre_trained_config(config_dict)
        from speculators_core.format.config import complete_layer_config  # heavy: not at start-up

        layer_config = config_dict.get("transformer_layer_config", {})
        if proposer.method == "eagle3" and isinstance(layer_config, dict):
            layer_config = {"model_type": "llama", **layer_config}  # vLLM's default
        draft = complete_layer_config(layer_config)
        check_rope(draft)
        proposer.configure(config_dict, draft)
        return {**draft, "speculative_method": proposer.method}

    @classmethod
    def build_vllm_speculative_config(
        cls, config_dict: dict[str, JsonValue]
    ) -> dict[str, JsonValue]:
        settings = super().build_vllm_speculative_config(config_dict)
        proposer = proposer_of(config_dict)
        if proposer is not None:
            settings |= {"method": proposer.method, **proposer.settings}
        return settings


def check_rope(draft: Mapping[str, JsonValue]) -> None:
    """Raises SpeculatorError for a scaling that vLLM would compute otherwise than the network."""
    rope = draft.get("rope_parameters")
    if not isinstance(rope, dict) or rope.get("rope_type") != "proportional":
        return
    if rope.get("factor", 1.0) != 1.0:
        raise SpeculatorError(
            f"rope_parameters of the draft have factor {rope['factor']} with rope_type "
            "'proportional', which vLLM ignores; expected none. Train the draft without it."
        )
