"""Compares the verifier alone in Transformers and vLLM.

Where a verifier is quantized, the two may multiply with other kernels and other scales; states and
texts then differ whatever the draft does.
"""

from collections.abc import Sequence

import torch
from pydantic import BaseModel
from transformers import PretrainedConfig, PreTrainedModel
from vllm import LLM, SamplingParams, TokensPrompt

from speculators_core.verifier.quantization import method_of

SCORED_TEXTS, SCORED_TOKENS = 4, 128
TOLERANCES = {torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Bounds on the difference of a token's log-probability between sound engines."""

Scores = list[tuple[float, int]]
"""Log-probability of each token of some texts, and the most likely token in its place."""


class VerifierDifference(BaseModel):
    """How far two engines compute one verifier differently."""

    quantization: str | None
    """Method of the verifier's checkpoint; None where it is not quantized."""
    num_tokens: int
    mean: float
    """Mean difference of a token's log-probability."""
    largest: float
    num_others: int
    """Places with another most likely token."""
    bound: float
    """Largest difference of equal verifiers."""

    @property
    def is_equal(self) -> bool:
        return self.largest <= self.bound

    def __str__(self) -> str:
        of_what = f" ({self.quantization})" if self.quantization else ""
        return (
            f"Transformers and vLLM compute the verifier{of_what} differently, without any draft: "
            f"log-probabilities of {self.num_tokens} tokens differ by {self.mean:.2g} on "
            f"average and {self.largest:.2g} at most (equal: {self.bound:g}), and the most likely "
            f"token at {self.num_others} places"
        )


def scored(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The parts of the first texts on which verifiers are compared."""
    return [list(text[:SCORED_TOKENS]) for text in texts[:SCORED_TEXTS]]


@torch.no_grad()
def reference_scores(verifier: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Scores:
    """The verifier's scores of these texts in Transformers."""
    scores: Scores = []
    for text in scored(texts):
        tokens = torch.tensor(text, device=verifier.device)
        logits = verifier(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        chances = logits.float().log_softmax(-1)
        own = chances.gather(1, tokens[1:, None])[:, 0]
        scores += zip(own.tolist(), chances.argmax(-1).tolist(), strict=True)
    return scores


def served_scores(llm: LLM, texts: Sequence[Sequence[int]]) -> Scores:
    """The verifier's scores of these texts in vLLM; drafts have no part in them."""
    parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    asked: list[TokensPrompt] = [{"prompt_token_ids": prompt} for prompt in scored(texts)]
    scores: Scores = []
    for prompt, output in zip(asked, llm.generate(asked, parameters, use_tqdm=False), strict=True):
        places = (output.prompt_logprobs or [])[1:]
        for token, place in zip(prompt["prompt_token_ids"][1:], places, strict=True):
            assert place is not None
            best = max(place, key=lambda one: place[one].logprob)
            scores.append((place[token].logprob, best))
    return scores


def compare_verifiers(
    config: PretrainedConfig, reference: Scores, served: Scores, dtype: torch.dtype
) -> VerifierDifference:
    """Both engines' scores of the same texts."""
    gaps = [abs(ours - theirs) for (ours, _), (theirs, _) in zip(reference, served, strict=True)]
    others = sum(ours != theirs for (_, ours), (_, theirs) in zip(reference, served, strict=True))
    return VerifierDifference(
        quantization=method_of(config),
        num_tokens=len(gaps),
        mean=sum(gaps) / max(1, len(gaps)),
        largest=max(gaps, default=0.0),
        num_others=others,
        bound=TOLERANCES[dtype],
    )
