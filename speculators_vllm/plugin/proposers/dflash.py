"""DFlash: vLLM's network, with a fix for CPUs."""

from collections.abc import Mapping

from pydantic import JsonValue

from speculators_core.errors import SpeculatorError
from speculators_vllm.plugin.proposers import Proposer, update_as_vllm

ARCHITECTURE = "SpeculatorsDFlash"


def configure(speculator: Mapping[str, JsonValue], draft: dict[str, JsonValue]) -> None:
    if speculator.get("sample_from_anchor"):
        raise SpeculatorError(
            "sample_from_anchor is true, which vLLM 0.32 does not serve for dflash; expected "
            "false. Serve it with the reference decoder, or train without it."
        )
    update_as_vllm("dflash", speculator, draft)
    draft["architectures"] = [ARCHITECTURE]
    kinds, settings = draft.get("layer_types"), draft["dflash_config"]
    assert isinstance(settings, dict)  # as vLLM makes it
    if not (isinstance(kinds, list) and "sliding_attention" in kinds):
        # Full attention alone is bidirectional in its block; vLLM would take a flag for it.
        settings["causal"] = bool(draft.get("is_causal"))


PROPOSER = Proposer(
    method="dflash",
    configure=configure,
    networks={ARCHITECTURE: "speculators_vllm.plugin.networks.dflash:DFlashForCausalLM"},
)
