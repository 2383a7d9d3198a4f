"""vLLM's outputs with speculation beside those without."""

import math
from collections.abc import Mapping, Sequence

from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams, TokensPrompt
from vllm.logprobs import Logprob

from speculators_vllm import offline
from speculators_vllm.verdicts.certificate import Divergence, FlagSet, GreedyTest, Kind
from speculators_vllm.verdicts.chi_square import LawTest, compare, count_prefixes

Draws = Mapping[int, list[list[int]]]
"""Sampled continuations, by number of the prompt."""


def _generate(
    llm: LLM, texts: Sequence[list[int]], parameters: SamplingParams
) -> list[RequestOutput]:
    inputs: list[TokensPrompt] = [{"prompt_token_ids": token_ids} for token_ids in texts]
    return llm.generate(inputs, parameters, use_tqdm=False) if inputs else []


def continue_greedily(
    llm: LLM,
    prompts: Sequence[list[int]],
    flags: FlagSet,
    max_tokens: int,
    logprobs: int | None = None,
) -> list[CompletionOutput]:
    """vLLM's greedy completion of each prompt, ``flags.concurrency`` at one time."""
    parameters = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        logprobs=logprobs,
        thinking_token_budget=flags.thinking_token_budget,
    )
    outputs: list[RequestOutput] = []
    for first in range(0, len(prompts), flags.concurrency):
        outputs += _generate(llm, prompts[first : first + flags.concurrency], parameters)
    return [output.outputs[0] for output in outputs]


def compare_greedy(
    llm: LLM,
    prompts: Sequence[list[int]],
    speculated: Sequence[CompletionOutput],
    dtype: str,
    flags: FlagSet,
    max_tokens: int,
    near_tie_bound: float | None,
) -> GreedyTest:
    """Completions with speculation beside those of ``llm``, which does not speculate."""
    alone = continue_greedily(llm, prompts, flags, max_tokens, logprobs=2)
    alone_ids = [list(output.token_ids) for output in alone]
    ids = [list(output.token_ids) for output in speculated]
    gaps = [_gap_of_best_two(position) for output in alone for position in output.logprobs or ()]
    return GreedyTest(
        dtype=dtype,
        flags=flags,
        near_tie_bound=near_tie_bound,
        alone=alone_ids,
        speculated=ids,
        accepted=[offline.accepted_of(output) for output in speculated],
        num_near_ties=sum(gap <= (near_tie_bound or 0.0) for gap in gaps),
        divergences=find_divergences(llm, prompts, alone_ids, ids),
    )


def _gap_of_best_two(scores: Mapping[int, Logprob]) -> float:
    best, second = sorted((entry.logprob for entry in scores.values()), reverse=True)[:2]
    return best - second


def find_divergences(
    llm: LLM,
    prompts: Sequence[list[int]],
    alone: Sequence[list[int]],
    speculated: Sequence[list[int]],
) -> list[Divergence]:
    """Outputs that differ, and how ``llm``, which does not speculate, scores them from there on.

    alone [7 3 9 2], speculated [7 5 1 4] -> position 1, the gap of 5, the largest of those of 1, 4
    """
    differing = [n for n in range(len(prompts)) if alone[n] != speculated[n]]
    texts = [prompts[number] + speculated[number] for number in differing]
    scored = _generate(llm, texts, SamplingParams(max_tokens=1, prompt_logprobs=1))
    found = []
    for number, output in zip(differing, scored, strict=True):
        ours, theirs = speculated[number], alone[number]
        pairs = enumerate(zip(ours, theirs, strict=False))
        shorter = min(len(ours), len(theirs))
        position = next((i for i, (a, b) in pairs if a != b), shorter)
        assert output.prompt_logprobs is not None
        scores = output.prompt_logprobs[len(prompts[number]) :]
        gaps = [_gap_to_best(token, s or {}) for token, s in zip(ours, scores, strict=True)]
        found.append(
            Divergence(
                prompt=number,
                position=position,
                verifier_token=theirs[position] if position < len(theirs) else None,
                speculated_token=ours[position] if position < len(ours) else None,
                gap=gaps[position] if position < shorter else None,
                largest_later_gap=max(gaps[position + 1 :], default=0.0),
            )
        )
    return found


def _gap_to_best(token: int, scores: Mapping[int, Logprob]) -> float:
    return max(entry.logprob for entry in scores.values()) - scores[token].logprob


def draw(
    llm: LLM, contexts: Mapping[int, list[int]], num_draws: int, num_tokens: int
) -> dict[int, list[list[int]]]:
    """Continuations of each context, sampled without a seed for each, as most requests are."""
    parameters = SamplingParams(
        n=num_draws, temperature=1.0, max_tokens=num_tokens, ignore_eos=True
    )
    outputs = _generate(llm, list(contexts.values()), parameters)
    return {
        number: [list(done.token_ids) for done in output.outputs]
        for number, output in zip(contexts, outputs, strict=True)
    }


def compare_draws(
    llm: LLM, contexts: Mapping[int, list[int]], by_kind: Mapping[Kind, Draws], num_logprobs: int
) -> dict[Kind, list[LawTest]]:
    """Each kind's tests, one a prompt, against the law of ``llm``, which does not speculate."""
    prefixes = sorted(
        {
            (number, prefix)
            for drawn in by_kind.values()
            for number, draws in drawn.items()
            for prefix in count_prefixes(draws)
        }
    )
    texts = [contexts[number] + list(prefix) for number, prefix in prefixes]
    laws: dict[int, dict[tuple[int, ...], dict[int, float]]] = {n: {} for n in contexts}
    for (number, prefix), law in zip(prefixes, _read_laws(llm, texts, num_logprobs), strict=True):
        laws[number][prefix] = law
    return {
        kind: [compare(number, draws, laws[number]) for number, draws in drawn.items()]
        for kind, drawn in by_kind.items()
    }


def _read_laws(llm: LLM, texts: Sequence[list[int]], num_logprobs: int) -> list[dict[int, float]]:
    """Probabilities of the likeliest next tokens of each text, at temperature 1."""
    parameters = SamplingParams(temperature=1.0, max_tokens=1, logprobs=num_logprobs)
    scores = [output.outputs[0].logprobs for output in _generate(llm, texts, parameters)]
    return [
        {token: math.exp(entry.logprob) for token, entry in positions[0].items()}
        for positions in scores
        if positions  # vLLM was asked for them
    ]
