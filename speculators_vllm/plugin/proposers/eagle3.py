"""EAGLE-3: vLLM's own networks, told how many states they read."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from speculators_vllm.plugin.proposers import Proposer

DEFAULT_NUM_AUX = 3


def configure(speculator: Mapping[str, Any], draft: MutableMapping[str, Any]) -> None:
    from vllm.transformers_utils.configs.speculators.algos import update_eagle3

    update_eagle3(dict(speculator), draft)  # type: ignore[arg-type]  # it says dict and sets keys
    # The format's default is false; vLLM takes true.
    draft["norm_before_residual"] = speculator.get("norm_before_residual", False)
    count_aux_states(draft)


def count_aux_states(draft: MutableMapping[str, Any]) -> None:
    """vLLM's Llama network (0.32) takes three where it is not told, whatever the layer ids say."""
    layer_ids = draft.get("eagle_aux_hidden_state_layer_ids")
    if layer_ids and len(layer_ids) != DEFAULT_NUM_AUX:
        draft["num_aux_hidden_states"] = len(layer_ids)


PROPOSER = Proposer(method="eagle3", configure=configure)
