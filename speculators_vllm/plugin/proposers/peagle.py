"""P-EAGLE: EAGLE-3's networks in vLLM, all tokens in one pass."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from speculators_vllm.plugin.proposers import Proposer
from speculators_vllm.plugin.proposers.eagle3 import count_aux_states


def configure(speculator: Mapping[str, Any], draft: MutableMapping[str, Any]) -> None:
    from vllm.transformers_utils.configs.speculators.algos import update_peagle

    update_peagle(dict(speculator), draft)  # type: ignore[arg-type]  # it says dict and sets keys
    draft["fc_norm"] = speculator.get("fc_norm", False)  # vLLM 0.32 drops it
    count_aux_states(draft)


PROPOSER = Proposer(method="eagle3", configure=configure, settings={"parallel_drafting": True})
