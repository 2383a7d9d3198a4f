"""DFlash: vLLM's own network, mended where a CPU runs it."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from speculators_core.errors import SpeculatorError
from speculators_vllm.plugin.proposers import Proposer

ARCHITECTURE = "SpeculatorsDFlash"


def configure(speculator: Mapping[str, Any], draft: MutableMapping[str, Any]) -> None:
    from vllm.transformers_utils.configs.speculators.algos import update_dflash

    if speculator.get("sample_from_anchor"):
        raise SpeculatorError(
            "sample_from_anchor is true, which vLLM 0.32 does not serve for dflash. "
            "The reference decoder runs it."
        )
    update_dflash(dict(speculator), draft)  # type: ignore[arg-type]  # it says dict and sets keys
    draft["architectures"] = [ARCHITECTURE]
    kinds = draft.get("layer_types") or ["full_attention"]
    if "sliding_attention" not in kinds:
        # Full attention alone is bidirectional in its block; vLLM would take a flag for it.
        draft["dflash_config"]["causal"] = bool(draft.get("is_causal") or False)


PROPOSER = Proposer(
    method="dflash",
    configure=configure,
    networks={ARCHITECTURE: "speculators_vllm.plugin.networks.dflash:DFlashForCausalLM"},
)
