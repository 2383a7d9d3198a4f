"""The reference decoder, to compare vLLM with."""

from collections.abc import Sequence

import torch

from speculators_core.decoding.acceptance import AcceptanceCounts
from speculators_core.decoding.generation import neutral_generation
from speculators_core.decoding.sequences import until_end
from speculators_core.format.checkpoint import as_dtype
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.verifier.pair import Pair
from speculators_core.verifier.reading import load_verifier
from speculators_vllm import offline
from speculators_vllm.offline import Continuation

COUNT_TOLERANCE = 0.01
"""Share of drafts by which two sides may differ at a position and still count as equal."""


def load_reference(pair: Pair, dtype: str) -> SpeculatorModel:
    """The speculator on Transformers with its verifier attached; auto is the verifier's dtype."""
    device = "cuda" if offline.has_gpu() else "cpu"
    verifier = load_verifier(pair.verifier, None if dtype == "auto" else as_dtype(dtype)).to(device)
    speculator = SpeculatorModel.from_pretrained(
        pair.speculator.folder,
        config=pair.speculator.config,
        verifier=verifier,
        dtype=verifier.dtype,
    )
    return speculator.to(device)


def decode(
    model: SpeculatorModel,
    prompt: Sequence[int],
    max_tokens: int,
    num_tokens: int,
    stop_ids: int | list[int] | None = None,
) -> Continuation:
    """A speculator's continuation of a prompt with the verifier that it has attached."""
    with neutral_generation(model.verifier):
        output = model.generate(
            torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
            max_new_tokens=max_tokens,
            num_assistant_tokens=num_tokens,
            do_sample=False,
            eos_token_id=stop_ids,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    (counts,) = output.acceptance
    new = output.sequences[0, len(prompt) :].tolist()
    return Continuation(until_end(new, stop_ids), counts.accepted)


def pool(accepted: Sequence[Sequence[int]], num_tokens: int) -> AcceptanceCounts:
    """The drafts of all requests together."""
    return AcceptanceCounts(num_tokens, [kept for one in accepted for kept in one])


def first_difference(expected: AcceptanceCounts, found: AcceptanceCounts) -> int | None:
    """The first position, from 1, at which two sides accept different numbers of tokens."""
    tolerance = COUNT_TOLERANCE * max(1, expected.num_drafts)
    pairs = zip(expected.accepted_per_position, found.accepted_per_position, strict=True)
    return next((at for at, (a, b) in enumerate(pairs, start=1) if abs(a - b) > tolerance), None)
