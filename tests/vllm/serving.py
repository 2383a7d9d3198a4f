"""What the tests of served speculators share."""

import torch
from transformers import PreTrainedModel

from benchmarks.engines import Draft
from speculators_core.batch import Batch
from speculators_core.model import SpeculatorModel
from speculators_core.prompts import TokenizedPrompt
from speculators_core.training.batches import pack
from speculators_core.training.trainer import run_verifier

EAGER = {"enforce_eager": True, "max_model_len": 512}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
"""A verifier's shape that vLLM's CPU attention takes."""


def run(engine, speculator, speculative_tokens, prompts, decoding):
    with engine.loaded(Draft("speculator", str(speculator), speculative_tokens)) as runner:
        return runner.run(prompts, decoding, lambda: None)


def as_prompts(ids):
    return [TokenizedPrompt(category="all", token_ids=list(tokens)) for tokens in ids]


def fit(model: SpeculatorModel, verifier: PreTrainedModel) -> None:
    """A few hundred steps on the verifier's own text, so that some proposals are kept."""
    starts = torch.arange(3, 35)[:, None]
    texts = verifier.generate(
        starts,
        attention_mask=torch.ones_like(starts),
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=0,
    )
    rows = [{"input_ids": t.tolist(), "loss_mask": [1] * len(t)} for t in texts]
    batches: list[Batch] = [
        run_verifier(verifier, pack(rows[first : first + 8], 8 * 49), model.config.aux_layer_ids)
        for first in range(0, 32, 8)
    ]
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=3e-3)
    for step in range(200):
        optimizer.zero_grad()
        model(batches[step % len(batches)])[1].backward()
        optimizer.step()
