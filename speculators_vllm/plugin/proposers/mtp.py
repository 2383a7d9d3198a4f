"""MTP: served from a folder, with our network."""

from collections.abc import Mapping

from pydantic import JsonValue

from speculators_core.errors import SpeculatorError
from speculators_vllm.plugin.proposers import Proposer

ARCHITECTURE = "SpeculatorsMTP"
BLOCKS = ("qwen3", "qwen2", "llama")


def configure(speculator: Mapping[str, JsonValue], draft: dict[str, JsonValue]) -> None:
    block = draft.get("model_type")
    if block not in BLOCKS:
        raise SpeculatorError(
            f"transformer_layer_config.model_type is {block!r}; expected one of "
            f"{', '.join(BLOCKS)}, whose blocks MTP is served with. Train the draft with one of "
            "these, or serve it with the reference decoder."
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
