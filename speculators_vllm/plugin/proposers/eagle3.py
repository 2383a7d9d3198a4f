"""EAGLE-3: vLLM's networks, for any number of states."""

from collections.abc import Mapping

from pydantic import JsonValue

from speculators_vllm.plugin.proposers import Proposer, update_as_vllm

DEFAULT_NUM_AUX = 3


def configure(speculator: Mapping[str, JsonValue], draft: dict[str, JsonValue]) -> None:
    update_as_vllm("eagle3", speculator, draft)
    # The format's default is false; vLLM takes true.
    draft["norm_before_residual"] = speculator.get("norm_before_residual", False)
    count_aux_states(draft)


def count_aux_states(draft: dict[str, JsonValue]) -> None:
    """States their number: without it vLLM's Llama network (0.32) reads three, whatever the ids."""
    layer_ids = draft.get("eagle_aux_hidden_state_layer_ids")
    count = len(set(layer_ids)) if isinstance(layer_ids, list) else 0
    if count not in (0, DEFAULT_NUM_AUX):
        draft["num_aux_hidden_states"] = count


PROPOSER = Proposer(method="eagle3", configure=configure)
