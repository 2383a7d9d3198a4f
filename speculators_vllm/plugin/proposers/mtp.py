"""MTP from its own directory, which vLLM alone does not serve."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from speculators_core.errors import SpeculatorError
from speculators_vllm.plugin.proposers import Proposer

ARCHITECTURE = "SpeculatorsMTP"
BLOCKS = ("qwen3", "qwen2", "llama")


def configure(speculator: Mapping[str, Any], draft: MutableMapping[str, Any]) -> None:
    block = draft.get("model_type")
    if block not in BLOCKS:
        raise SpeculatorError(
            f"transformer_layer_config.model_type {block!r}: MTP is served with the blocks of "
            f"{', '.join(BLOCKS)}."
        )
    draft.update(
        architectures=[ARCHITECTURE],
        mtp_block=block,
        verifier_state=speculator.get("verifier_state", "post_norm"),
        num_hidden_layers=1,
        num_nextn_predict_layers=1,
        n_predict=1,
        # The block sees all of the text, whatever windows the verifier's layers have.
        layer_types=None,
        sliding_window=None,
        use_sliding_window=False,
        tie_word_embeddings=False,
    )


PROPOSER = Proposer(
    method="mtp",
    configure=configure,
    networks={ARCHITECTURE: "speculators_vllm.plugin.networks.mtp:MTPForCausalLM"},
)
