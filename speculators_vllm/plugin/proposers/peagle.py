"""P-EAGLE: vLLM's EAGLE-3 networks, in one pass."""

from collections.abc import Mapping

from pydantic import JsonValue

from speculators_vllm.plugin.proposers import Proposer, update_as_vllm
from speculators_vllm.plugin.proposers.eagle3 import count_aux_states


def configure(speculator: Mapping[str, JsonValue], draft: dict[str, JsonValue]) -> None:
    update_as_vllm("peagle", speculator, draft)
    draft["fc_norm"] = speculator.get("fc_norm", False)  # vLLM 0.32 drops it
    count_aux_states(draft)


PROPOSER = Proposer(method="eagle3", configure=configure, settings={"parallel_drafting": True})
