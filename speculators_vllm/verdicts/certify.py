"""``speculators certify``: is this speculator lossless on vLLM, with these flags?

Runs the real engine in this process, with speculation and without, and asks four questions:

- Are greedy outputs in float32 equal, token for token, under every set of flags?
- In other dtypes, where matrices of other shapes round otherwise: does each output that differs
  still follow the verifier? The verifier alone scores every token from the first difference on;
  each must lie within a stated bound of its best logit: a near tie.
- Does vLLM keep as many tokens of the drafts, position by position, as the reference decoder?
- Do tokens sampled at temperature 1 follow the verifier's law? See `chi_square` for the test. The
  law is what the same engine without speculation says in logprobs; draws without speculation stand
  the same test, so that a fault of the law or of the test is not laid at speculation's door.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field

from speculators_core.console import console, progress, result_alone_on_stdout
from speculators_core.errors import SpeculatorError
from speculators_core.flags import Several
from speculators_core.settings import Settings
from speculators_vllm import offline

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
NEAR_TIES = {"bfloat16": 0.25, "float16": 0.03}
"""Two steps between numbers of 16 to 32, where the best logits of a language model mostly lie."""
FIXED = ("model", "method")
"""Speculative settings that the speculator decides."""
CONCURRENCY = "concurrency"
MIN_LOGPROBS = 20
CONTEXT_TOKENS = 16
"""Of a prompt, before what is sampled: a law holds after any text, and where prefixes are not
cached every draw reads its own."""


class CertifyConfig(Settings):
    """What is certified, and how hard it is tried."""

    verifier: str | None = None
    """Verifier; the one that the speculator names where none is given."""
    prompts: str | None = None
    """A JSONL file or a hub data set; a dozen built-in ones where none is given."""
    flags: Annotated[tuple[dict[str, Any], ...], Several] = ()
    """Sets of vLLM arguments, each as JSON, with `concurrency` for requests at one time. Where
    none is given: none, no prefix caching, chunked prefill with a small budget, and 8 requests at
    one time. Tokens are sampled with the first set."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of vLLM's `LLM` for every set, as JSON."""
    speculative_config: dict[str, Any] = Field(default_factory=dict)
    """Keys over the checkpoint's, as JSON: num_speculative_tokens, draft_sample_method, ..."""
    dtypes: Annotated[tuple[Dtype, ...], Several, Field(min_length=1)] = ("float32", "auto")
    """Of both models; auto is the verifier's own."""
    max_tokens: int = Field(64, ge=2)
    """New tokens of each greedy output, at most."""
    near_tie: float | None = Field(None, ge=0.0)
    """Bound on a logit gap, in dtypes other than float32; by dtype where none is given."""
    draws: int = Field(500, ge=50)
    """Continuations sampled of each prompt."""
    sampled_prompts: int = Field(4, ge=1)
    """Prompts to sample from, spread over them all."""
    significance: float = Field(1e-3, gt=0.0, lt=0.5)
    """Chance that a lossless engine fails any of the tests of sampled tokens."""
    seed: int = Field(0, ge=0)
    """Of the engines."""
    output: Path | None = None
    """Folder for certificate.json and certificate.html."""
    verbose: Annotated[bool, Parameter(negative=())] = False
    """Print what vLLM prints while it starts, instead of writing it to a log file."""
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
    """Print the certificate as JSON, nothing else."""


def run(
    speculator: Annotated[str, Parameter(help="Folder or hub id.")],
    /,
    *,
    settings: Annotated[CertifyConfig | None, Parameter(name="*")] = None,
) -> None:
    """Certifies that a speculator, served by vLLM, leaves its verifier's output as it is.

    Exit code 1 says that it does not.
    """
    settings = settings or CertifyConfig()
    with result_alone_on_stdout() if settings.as_json else nullcontext():
        certificate = certify(speculator, settings)
        from speculators_vllm.verdicts.certificate import print_certificate, write_certificate

        if not settings.as_json:
            print_certificate(certificate, console)
        if settings.output is not None:
            written = write_certificate(certificate, settings.output)
            console.print(f"wrote {' and '.join(map(str, written))}")
    if settings.as_json:
        sys.stdout.write(certificate.model_dump_json(indent=1) + "\n")
    if certificate.faults:
        more = f" (and {len(certificate.faults) - 1} more)" if len(certificate.faults) > 1 else ""
        sys.stderr.write(f"not certified: {certificate.faults[0]}{more}\n")
        sys.exit(1)


def certify(speculator: str, settings: CertifyConfig) -> Any:
    """The certificate.

    Raises:
        SpeculatorError: options, speculator, verifier or prompts are at fault; nothing was loaded.
    """
    start = time.monotonic()
    offline.prepare(settings.verbose)
    from speculators_core.decoding.prompts import hash_prompts
    from speculators_core.format.checkpoint import fetch
    from speculators_core.provenance import environment, hash_weights
    from speculators_vllm.verdicts.certificate import Certificate

    plan = _check(speculator, settings)
    greedy, sampled = [], []
    with progress("certify", 2 * len(plan.dtypes) * len(plan.groups)) as done:
        for dtype in plan.dtypes:
            for group in plan.groups:
                of_group = _test_group(plan, dtype, group, done)
                greedy += of_group[0]
                sampled += of_group[1]
    return Certificate(
        settings={**settings.model_dump(mode="json"), "dtypes": plan.dtypes},
        speculator=speculator,
        speculator_sha256=hash_weights(fetch(speculator)),
        verifier=plan.verifier,
        verifier_sha256=hash_weights(fetch(plan.verifier)),
        speculative_config=plan.speculative_config,
        environment=environment(),
        prompts_sha256=hash_prompts(plan.prompts),
        num_prompts=len(plan.prompts),
        greedy=greedy,
        reference_accepted=_decode_reference(plan) if "float32" in plan.dtypes else None,
        sampled=sampled,
        seconds=time.monotonic() - start,
    )


@dataclass(frozen=True)
class _Plan:
    """What is run, found to be whole and to fit together."""

    settings: CertifyConfig
    verifier: str
    speculative_config: dict[str, Any]
    prompts: list[Any]
    flag_sets: list[Any]
    dtypes: list[str]
    vocab_size: int

    @property
    def groups(self) -> list[list[Any]]:
        """Sets of flags that one engine serves, in order; the first one's is the first."""
        groups: list[list[Any]] = []
        for flags in self.flag_sets:
            found = next((g for g in groups if g[0].engine_args == flags.engine_args), None)
            if found is None:
                groups.append([flags])
            else:
                found.append(flags)
        return groups

    @property
    def contexts(self) -> dict[int, list[int]]:
        """What stands before the tokens that are sampled, by number of the prompt."""
        total = len(self.prompts)
        wanted = min(self.settings.sampled_prompts, total)
        numbers = (number * total // wanted for number in range(wanted))
        return {number: self.prompts[number].token_ids[:CONTEXT_TOKENS] for number in numbers}

    def near_tie(self, dtype: str) -> float | None:
        """None where outputs must be equal."""
        if dtype == "float32":
            return None
        given = self.settings.near_tie
        return NEAR_TIES.get(dtype, 0.0) if given is None else given

    @property
    def num_sampled_tokens(self) -> int:
        """The prefill's, one of each place in a draft, and the bonus token."""
        return self.speculative_config["num_speculative_tokens"] + 2

    @property
    def num_logprobs(self) -> int:
        """Enough for every token of which 5 draws can be expected."""
        return min(max(self.settings.draws // 5, MIN_LOGPROBS), self.vocab_size)

    def arguments(self, dtype: str, flags: Any) -> dict[str, Any]:
        """Of vLLM without speculation."""
        return {
            "model": self.verifier,
            "dtype": dtype,
            "seed": self.settings.seed,
            "max_logprobs": self.num_logprobs,
            **offline.default_arguments(),
            **self.settings.engine_args,
            **flags.engine_args,
        }

    def speculating(self, dtype: str, flags: Any) -> dict[str, Any]:
        return {
            **self.arguments(dtype, flags),
            "speculative_config": dict(self.speculative_config),
        }


def _check(speculator: str, settings: CertifyConfig) -> _Plan:
    """Raises SpeculatorError for whatever is at fault, before any weights are loaded."""
    from speculators_core.decoding.prompts import read_prompts, tokenize
    from speculators_core.format import checkpoint
    from speculators_core.format.checkpoint import locate_verifier
    from speculators_core.format.config import SpeculatorModelConfig
    from speculators_core.format.loading import check_checkpoint
    from speculators_core.verifier.fit import check_verifier
    from speculators_core.verifier.reading import read_tokenizer, read_verifier_config
    from speculators_vllm.plugin.speculative_config import check_served, vllm_settings

    _check_output(settings.output)
    given = None if settings.prompts is None else read_prompts(settings.prompts)
    folder = checkpoint.fetch(speculator)
    raw = checkpoint.read_config(folder)
    config = SpeculatorModelConfig.from_pretrained(folder)
    named = settings.verifier or config.verifier.name_or_path
    if named is None:
        raise SpeculatorError(f"{speculator} names no verifier. Pass --verifier.")
    verifier = named if settings.verifier else locate_verifier(named, beside=folder)
    verifier_config = read_verifier_config(verifier)
    check_verifier(config, verifier_config)
    check_checkpoint(folder, config)
    check_served(speculator, raw)

    speculative = offline.check_names("--speculative-config", settings.speculative_config, FIXED)
    speculative = {**vllm_settings(raw), **speculative, "model": speculator}
    speculative_tokens = speculative["num_speculative_tokens"]
    if not isinstance(speculative_tokens, int) or speculative_tokens < 1:
        raise SpeculatorError(
            f"num_speculative_tokens must be at least 1, found {speculative_tokens!r}."
        )
    flag_sets = _read_flags(settings, speculative_tokens)
    tokenizer = read_tokenizer(verifier)
    if given is None:
        from speculators_core.decoding.default_prompts import default_prompts

        given = default_prompts(tokenizer)
    longest = offline.longest_text(
        verifier_config, settings.engine_args, *(flags.engine_args for flags in flag_sets)
    )
    num_new = max(settings.max_tokens, speculative_tokens + 2)
    plan = _Plan(
        settings=settings,
        verifier=verifier,
        speculative_config=speculative,
        prompts=tokenize(given, tokenizer, longest - num_new),
        flag_sets=flag_sets,
        dtypes=[],
        vocab_size=verifier_config.get_text_config().vocab_size,
    )
    return _settle(plan)


def _check_output(folder: Path | None) -> None:
    from speculators_core.files import check_writable

    if folder is None:
        return
    try:
        check_writable(folder)
    except OSError as error:
        raise SpeculatorError(f"{folder}: cannot write a certificate there ({error}).") from error


def _read_flags(settings: CertifyConfig, speculative_tokens: int) -> list[Any]:
    """The sets of flags to try.

    Raises:
        SpeculatorError: vLLM has no such argument, or it is not for the user to set.
    """
    from speculators_vllm.verdicts.certificate import FlagSet

    offline.check_names("--engine-args", settings.engine_args, offline.DECIDED)
    default: tuple[dict[str, Any], ...] = (
        {},
        {"enable_prefix_caching": False, CONCURRENCY: 4},
        {
            "enable_chunked_prefill": True,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 4 * (speculative_tokens + 1) + 16,
            CONCURRENCY: 4,
        },
        {CONCURRENCY: 8},
    )
    found = []
    for given in settings.flags or default:
        concurrency = given.get(CONCURRENCY, 1)
        if not isinstance(concurrency, int) or concurrency < 1:
            raise SpeculatorError(f"--flags {CONCURRENCY}: at least 1, found {concurrency!r}.")
        flags = {key: value for key, value in given.items() if key != CONCURRENCY}
        flags = offline.check_names("--flags", flags, offline.DECIDED)
        found.append(FlagSet(engine_args=flags, concurrency=concurrency))
    return found


def _settle(plan: _Plan) -> _Plan:
    """The plan with the dtypes that vLLM takes.

    Raises:
        SpeculatorError: vLLM does not take these arguments.
    """
    from dataclasses import replace

    with offline.quiet():
        from vllm.engine.arg_utils import EngineArgs

    dtypes: dict[str, None] = {}
    first = plan.groups[0][0]
    asked = [(dtype, first) for dtype in plan.settings.dtypes]
    asked += [(plan.settings.dtypes[0], group[0]) for group in plan.groups[1:]]
    for dtype, flags in asked:
        arguments = plan.speculating(dtype, flags)
        try:
            with offline.quiet():
                config = EngineArgs(**arguments).create_engine_config()
        except (ValueError, TypeError, NotImplementedError) as error:
            raise SpeculatorError(
                f"vLLM refuses the flags {flags.name} with dtype {dtype} and "
                f"{plan.speculative_config}: {offline.in_one_line(error)}"
            ) from error
        dtypes[str(config.model_config.dtype).removeprefix("torch.")] = None
    return replace(plan, dtypes=list(dtypes))


def _decode_reference(plan: _Plan) -> list[list[int]]:
    """What the reference decoder keeps of each draft, in float32, one list a prompt."""
    import torch

    from speculators_core.models.speculator import SpeculatorModel
    from speculators_core.verifier.reading import load_verifier
    from speculators_vllm.verdicts.reference import decode

    verifier: Any = load_verifier(plan.verifier, torch.float32)
    verifier.to("cuda" if offline.has_gpu() else "cpu")
    model: Any = SpeculatorModel.from_pretrained(
        plan.speculative_config["model"], verifier=verifier, dtype=torch.float32
    ).to(verifier.device)
    num_tokens = plan.speculative_config["num_speculative_tokens"]
    stop_ids = verifier.generation_config.eos_token_id
    return [
        decode(model, prompt.token_ids, plan.settings.max_tokens, num_tokens, stop_ids).accepted
        for prompt in plan.prompts
    ]


def _test_group(
    plan: _Plan, dtype: str, group: list[Any], done: Any
) -> tuple[list[Any], list[Any]]:
    """All tests of the sets of flags that one engine serves: with speculation, then without."""
    from speculators_vllm.verdicts.certificate import SampledTest
    from speculators_vllm.verdicts.comparison import (
        compare_draws,
        compare_greedy,
        continue_greedily,
        draw,
    )

    prompts = [prompt.token_ids for prompt in plan.prompts]
    contexts = plan.contexts if group[0] == plan.flag_sets[0] else {}
    num_draws, num_tokens = plan.settings.draws, plan.num_sampled_tokens
    max_tokens = plan.settings.max_tokens
    with offline.loaded(**plan.speculating(dtype, group[0])) as llm:
        speculated = [continue_greedily(llm, prompts, flags, max_tokens) for flags in group]
        drawn = {"with speculation": draw(llm, contexts, num_draws, num_tokens)}
        done(dtype)
    with offline.loaded(**plan.arguments(dtype, group[0])) as llm:
        greedy = [
            compare_greedy(llm, prompts, outputs, dtype, flags, max_tokens, plan.near_tie(dtype))
            for flags, outputs in zip(group, speculated, strict=True)
        ]
        drawn["without"] = draw(llm, contexts, num_draws, num_tokens)
        by_kind = compare_draws(llm, contexts, drawn, plan.num_logprobs)
        done(dtype)
    sampled = [
        SampledTest(
            dtype=dtype,
            flags=group[0],
            drawn=kind,
            num_tokens=num_tokens,
            significance=plan.settings.significance / (2 * len(plan.dtypes)),
            prompts=tests,
        )
        for kind, tests in by_kind.items()
        if contexts
    ]
    return greedy, sampled
