"""How vLLM serves the algorithm of another package."""

from speculators_vllm.plugin.proposers import Proposer


def configure(speculator, draft):
    draft.update(
        architectures=["Bigram"],
        rank=speculator["rank"],
        num_hidden_layers=1,
        n_predict=1,
        num_nextn_predict_layers=1,
        tie_word_embeddings=False,
    )


PROPOSER = Proposer(
    method="mtp", configure=configure, networks={"Bigram": "bigram_network:BigramForCausalLM"}
)
