"""Certifies that a speculator is lossless on vLLM.

Runs the real engine in this process, with speculation and without, and asks four questions:

- Are greedy outputs in float32 equal, token for token, under every set of flags?
- In other dtypes, where matrices of other shapes round otherwise: does each output that differs
  still follow the verifier? The verifier alone scores every token from the first difference on;
  each must lie within a stated bound of its best logit: a near tie.
- Does vLLM accept as many tokens of the drafts, position by position, as the reference decoder?
- Do tokens sampled at temperature 1 follow the verifier's law? See `chi_square` for the test. The
  law is what the same engine without speculation reports in logprobs; draws without speculation
  must pass the same test, so that a fault of the law or of the test is not attributed to
  speculation.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from vllm.engine.arg_utils import EngineArgs

from speculators_core.console import Advance, progress
from speculators_core.decoding.default_prompts import default_prompts
from speculators_core.decoding.prompts import (
    TokenizedPrompt,
    hash_prompts,
    read_prompts,
    tokenize,
)
from speculators_core.errors import SpeculatorError
from speculators_core.files import check_writable
from speculators_core.format import checkpoint
from speculators_core.provenance import environment, hash_weights
from speculators_core.verifier.pair import Pair
from speculators_core.verifier.reading import read_tokenizer
from speculators_core.verifier.sizes import required_size
from speculators_vllm import offline
from speculators_vllm.plugin.speculative_config import check_served, vllm_settings
from speculators_vllm.verdicts.certificate import (
    Certificate,
    FlagSet,
    GreedyTest,
    Kind,
    SampledTest,
)
from speculators_vllm.verdicts.comparison import (
    Draws,
    compare_draws,
    compare_greedy,
    continue_greedily,
    draw,
)
from speculators_vllm.verdicts.reference import decode, load_reference
from speculators_vllm.verdicts.settings import Arguments, CertifyConfig
from speculators_vllm.verdicts.verifiers import (
    Scores,
    VerifierDifference,
    compare_verifiers,
    reference_scores,
    served_scores,
)

NEAR_TIES = {"bfloat16": 0.25, "float16": 0.03}
"""Two steps between numbers of 16 to 32, where the best logits of a language model mostly lie."""
FIXED = ("model", "method")
"""Speculative settings that the speculator decides."""
CONCURRENCY, BUDGET = "concurrency", "thinking_token_budget"
REASONING = ("reasoning_parser", "reasoning_config")
"""vLLM's arguments with which requests may have a budget of thinking tokens."""
MIN_LOGPROBS = 20
CONTEXT_TOKENS = 16
"""Tokens of a prompt before those that are sampled: a law holds after any text, and where prefixes
are not cached every draw reads its own."""


def certify(speculator: str, config: CertifyConfig) -> Certificate:
    """The certificate; call `offline.prepare` first.

    Raises:
        SpeculatorError: options, speculator, verifier or prompts are at fault; nothing was loaded.
    """
    start = time.monotonic()
    plan = _check(speculator, config)
    greedy: list[GreedyTest] = []
    sampled: list[SampledTest] = []
    served: Scores = []
    with progress("certify", 2 * len(plan.dtypes) * len(plan.groups)) as done:
        for dtype in plan.dtypes:
            for group in plan.groups:
                of_group = _test_group(plan, dtype, group, done)
                greedy += of_group[0]
                sampled += of_group[1]
                served = served or of_group[2]
    exact = next((test for test in greedy if test.dtype == "float32"), None)
    reference = None if exact is None else _decode_reference(plan, exact, served)
    return Certificate(
        settings={**config.model_dump(mode="json"), "dtypes": plan.dtypes},
        speculator=speculator,
        speculator_sha256=hash_weights(plan.pair.speculator.folder),
        verifier=plan.pair.verifier,
        verifier_sha256=hash_weights(checkpoint.fetch(plan.pair.verifier)),
        speculative_config=plan.speculative_config,
        speculative_tokens=plan.num_tokens,
        environment=environment(),
        prompts_sha256=hash_prompts(plan.prompts),
        num_prompts=len(plan.prompts),
        greedy=greedy,
        reference_accepted=None if reference is None else reference[0],
        verifiers=None if reference is None else reference[1],
        sampled=sampled,
        seconds=time.monotonic() - start,
    )


@dataclass(frozen=True)
class _Plan:
    """What is run, found to be whole and to fit together."""

    config: CertifyConfig
    pair: Pair
    num_tokens: int
    """Speculative tokens."""
    speculative_config: Arguments
    prompts: Sequence[TokenizedPrompt]
    flag_sets: Sequence[FlagSet]
    dtypes: Sequence[str]

    @property
    def groups(self) -> list[list[FlagSet]]:
        """Sets of flags that one engine serves, in order; the first one's is the first."""
        groups: list[list[FlagSet]] = []
        for flags in self.flag_sets:
            found = next((g for g in groups if g[0].engine_args == flags.engine_args), None)
            if found is None:
                groups.append([flags])
            else:
                found.append(flags)
        return groups

    @property
    def contexts(self) -> dict[int, list[int]]:
        """The tokens before those that are sampled, by number of the prompt."""
        total = len(self.prompts)
        wanted = min(self.config.sampled_prompts, total)
        numbers = (number * total // wanted for number in range(wanted))
        return {number: self.prompts[number].token_ids[:CONTEXT_TOKENS] for number in numbers}

    def with_answers(self, test: GreedyTest) -> list[list[int]]:
        """The prompts with the verifier's answers; some have a single token."""
        pairs = zip(self.prompts, test.alone, strict=True)
        return [prompt.token_ids + answer for prompt, answer in pairs]

    def near_tie(self, dtype: str) -> float | None:
        """Bound on a logit gap; None where outputs must be equal."""
        if dtype == "float32":
            return None
        given = self.config.near_tie
        return NEAR_TIES.get(dtype, 0.0) if given is None else given

    @property
    def num_sampled_tokens(self) -> int:
        """The prefill's token, one of each place in a draft, and the bonus token."""
        return self.num_tokens + 2

    @property
    def num_logprobs(self) -> int:
        """Enough for every token of which 5 draws can be expected."""
        vocab_size: int = self.pair.verifier_config.get_text_config().vocab_size
        return min(max(self.config.draws // 5, MIN_LOGPROBS), vocab_size)

    def arguments(self, dtype: str, flags: FlagSet) -> Arguments:
        """Arguments of vLLM without speculation."""
        return {
            "model": self.pair.verifier,
            "dtype": dtype,
            "seed": self.config.seed,
            "max_logprobs": self.num_logprobs,
            **offline.default_arguments(),
            **self.config.engine_args,
            **flags.engine_args,
        }

    def speculating(self, dtype: str, flags: FlagSet) -> Arguments:
        """Arguments of vLLM with speculation."""
        return {
            **self.arguments(dtype, flags),
            "speculative_config": dict(self.speculative_config),
        }


def _check(speculator: str, config: CertifyConfig) -> _Plan:
    """Raises SpeculatorError for whatever is at fault, before any weights are loaded."""
    _check_output(config.output)
    given = None if config.prompts is None else read_prompts(config.prompts)
    pair = Pair.open(speculator, config.verifier)
    check_served(speculator, pair.speculator.raw)
    stated = offline.check_names("--speculative-config", config.speculative_config, FIXED)
    speculative = {**vllm_settings(pair.speculator.raw), **stated, "model": speculator}
    num_tokens = speculative["num_speculative_tokens"]
    if not isinstance(num_tokens, int) or num_tokens < 1:
        raise SpeculatorError(
            f"--speculative-config: num_speculative_tokens is {num_tokens!r}, expected an integer "
            "of at least 1. Correct it, or leave it out."
        )
    flag_sets = _read_flags(config, num_tokens)
    tokenizer = read_tokenizer(pair.verifier)
    longest = offline.longest_text(
        pair.verifier_config, config.engine_args, *(flags.engine_args for flags in flag_sets)
    )
    num_new = max(config.max_tokens, num_tokens + 2)
    prompts = default_prompts(tokenizer) if given is None else given
    return _settle(
        _Plan(
            config=config,
            pair=pair,
            num_tokens=num_tokens,
            speculative_config=speculative,
            prompts=tokenize(
                prompts,
                tokenizer,
                longest - num_new,
                config.template_options,
                required_size(pair.verifier_config.get_text_config(), "vocab_size"),
            ),
            flag_sets=flag_sets,
            dtypes=(),
        )
    )


def _check_output(folder: Path | None) -> None:
    if folder is None:
        return
    try:
        check_writable(folder)
    except OSError as error:
        raise SpeculatorError(
            f"--output: a certificate cannot be written to {folder} ({error}). Choose a writable "
            "folder."
        ) from error


def _read_flags(config: CertifyConfig, num_tokens: int) -> list[FlagSet]:
    """The sets of flags to try.

    Raises:
        SpeculatorError: vLLM has no such argument, or it is not for the user to set.
    """
    offline.check_names("--engine-args", config.engine_args, offline.DECIDED)
    default: tuple[Mapping[str, bool | int], ...] = (
        {},
        {"enable_prefix_caching": False, CONCURRENCY: 4},
        {
            "enable_chunked_prefill": True,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 4 * (num_tokens + 1) + 16,
            CONCURRENCY: 4,
        },
        {CONCURRENCY: 8},
    )
    if any(key.replace("-", "_") in REASONING for key in config.engine_args):
        default += ({CONCURRENCY: 8, BUDGET: config.max_tokens // 4},)
    found = []
    for given in config.flags or default:
        concurrency = given.get(CONCURRENCY, 1)
        if not isinstance(concurrency, int) or concurrency < 1:
            raise SpeculatorError(
                f"--flags: {CONCURRENCY} is {concurrency!r}, expected an integer of at least 1. "
                "Correct it."
            )
        budget = given.get(BUDGET)
        if budget is not None and (not isinstance(budget, int) or budget < 0):
            raise SpeculatorError(
                f"--flags: {BUDGET} is {budget!r}, expected an integer of at least 0. Correct it."
            )
        flags = {key: value for key, value in given.items() if key not in (CONCURRENCY, BUDGET)}
        flags = offline.check_names("--flags", flags, offline.DECIDED)
        found.append(
            FlagSet(engine_args=flags, concurrency=concurrency, thinking_token_budget=budget)
        )
    return found


def _settle(plan: _Plan) -> _Plan:
    """The plan with the dtypes that vLLM takes.

    Raises:
        SpeculatorError: vLLM does not take these arguments.
    """
    dtypes: dict[str, None] = {}
    first = plan.groups[0][0]
    asked = [(dtype, first) for dtype in plan.config.dtypes]
    asked += [(plan.config.dtypes[0], group[0]) for group in plan.groups[1:]]
    for dtype, flags in asked:
        try:
            with offline.quiet():
                config = EngineArgs(**plan.speculating(dtype, flags)).create_engine_config()
        except (ValueError, TypeError, NotImplementedError) as error:
            raise SpeculatorError(
                f"vLLM refuses the flags {flags.name} with dtype {dtype} and "
                f"{plan.speculative_config}: {offline.in_one_line(error)} Change --flags, "
                "--dtypes, --engine-args or --speculative-config."
            ) from error
        dtypes[str(config.model_config.dtype).removeprefix("torch.")] = None
    return replace(plan, dtypes=list(dtypes))


def _decode_reference(
    plan: _Plan, test: GreedyTest, served: Scores
) -> tuple[list[list[int]], VerifierDifference]:
    """Tokens that the reference decoder accepts of each draft, in float32, one list a prompt.

    With them, how far its verifier differs from the one that gave the scores of a test's texts.
    """
    model = load_reference(plan.pair, "float32")
    generation = model.verifier.generation_config
    stop_ids = None if generation is None else generation.eos_token_id
    accepted = [
        decode(model, prompt.token_ids, plan.config.max_tokens, plan.num_tokens, stop_ids).accepted
        for prompt in plan.prompts
    ]
    scores = reference_scores(model.verifier, plan.with_answers(test))
    config = plan.pair.verifier_config
    return accepted, compare_verifiers(config, scores, served, torch.float32)


def _test_group(
    plan: _Plan, dtype: str, group: Sequence[FlagSet], done: Advance
) -> tuple[list[GreedyTest], list[SampledTest], Scores]:
    """All tests of the sets of flags that one engine serves: with speculation, then without.

    With them the verifier's scores of prompts and answers in float32; none in other dtypes.
    """
    prompts = [prompt.token_ids for prompt in plan.prompts]
    first = group[0]
    contexts = plan.contexts if first == plan.flag_sets[0] else {}
    num_draws, num_tokens = plan.config.draws, plan.num_sampled_tokens
    max_tokens = plan.config.max_tokens
    with offline.loaded(**plan.speculating(dtype, first)) as llm:
        # A forced end scores low: where a near tie fell otherwise before it, all would seem lossy.
        group = [f for f in group if dtype == "float32" or f.thinking_token_budget is None]
        speculated = [continue_greedily(llm, prompts, flags, max_tokens) for flags in group]
        drawn: dict[Kind, Draws] = {"with speculation": draw(llm, contexts, num_draws, num_tokens)}
        done(dtype)
    with offline.loaded(**plan.arguments(dtype, first)) as llm:
        greedy = [
            compare_greedy(llm, prompts, outputs, dtype, flags, max_tokens, plan.near_tie(dtype))
            for flags, outputs in zip(group, speculated, strict=True)
        ]
        drawn["without"] = draw(llm, contexts, num_draws, num_tokens)
        by_kind = compare_draws(llm, contexts, drawn, plan.num_logprobs)
        texts = plan.with_answers(greedy[0]) if dtype == "float32" else []
        scores = served_scores(llm, texts) if texts else []
        done(dtype)
    sampled = [
        SampledTest(
            dtype=dtype,
            flags=first,
            drawn=kind,
            num_tokens=num_tokens,
            significance=plan.config.significance / (2 * len(plan.dtypes)),
            prompts=tests,
        )
        for kind, tests in by_kind.items()
        if contexts
    ]
    return greedy, sampled, scores
