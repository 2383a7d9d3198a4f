"""vLLM inside this process: loads an engine, runs token ids through it, shuts it down."""

import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.registry import did_you_mean
from speculators_vllm import openmp

CPU_KV_CACHE_GIB = "1"
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
"""vLLM's arguments that `check` and `certify` decide, or have an option of their own for."""
PLUGIN = "speculators"
"""The name of our entry point among vLLM's."""


def prepare() -> None:
    """vLLM in this process and quiet, and on a CPU Intel's OpenMP under it; before torch is used.

    Raises:
        SpeculatorError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise SpeculatorError(
            "vLLM is not installed. Install speculators-vllm[cpu] or speculators-vllm[cuda]."
        )
    openmp.preload()
    if not has_gpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_CACHE_GIB)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def default_arguments() -> dict[str, Any]:
    """On a CPU eager: compiling takes a minute."""
    return {} if has_gpu() else {"enforce_eager": True}


def has_plugin() -> bool:
    """Whether vLLM will load our plug-in: ``VLLM_PLUGINS`` may leave it out."""
    chosen = os.environ.get("VLLM_PLUGINS")
    return chosen is None or PLUGIN in chosen.split(",")


def told(error: Exception) -> str:
    """What is wrong in one line, pydantic's complaint where it judged."""
    return first_fault(error) if isinstance(error, ValidationError) else first_line(error)


def check_names(option: str, given: Mapping[str, Any], taken: Sequence[str]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` under vLLM's names.

    Raises:
        SpeculatorError: vLLM does not know a key, or it is one of those that are ``taken``.
    """
    if not given:  # importing vLLM takes seconds, which another fault need not wait for
        return {}
    from vllm.config import SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

    owner = SpeculativeConfig if option == "--speculative-config" else EngineArgs
    known = {field.name for field in fields(owner)}
    named = {key.replace("-", "_"): value for key, value in given.items()}
    for key in named:
        if key in taken:
            raise SpeculatorError(f"{option} {key}: this command decides it itself.")
        if key not in known:
            raise SpeculatorError(
                f"{option} {key}: vLLM has no such argument.{did_you_mean(key, known)}"
            )
    return named


def longest_text(config: Any, *arguments: Mapping[str, Any]) -> int:
    """Positions that a verifier has, or fewer where vLLM's ``max_model_len`` says so.

    Raises:
        SpeculatorError: max_model_len is no number.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)
    for given in arguments:
        stated = given.get("max_model_len", longest)
        if not isinstance(stated, int):
            raise SpeculatorError(f"max_model_len: expected a number, found {stated!r}.")
        longest = min(longest, stated)
    return longest


@contextmanager
def loaded(**arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM` of these arguments, which says of each request what it kept of each draft.

    Raises:
        SpeculatorError: vLLM does not start with them.
    """
    from vllm import LLM

    if arguments.get("speculative_config") is not None:
        arguments["per_request_spec_decode_metrics"] = "detailed"
    try:
        llm = LLM(**arguments)
    except SpeculatorError:
        raise
    except Exception as error:  # of many kinds: settings, memory, its own assertions
        raise SpeculatorError(f"vLLM did not start: {told(error)}") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@dataclass(frozen=True)
class Continuation:
    """What one request gave."""

    token_ids: list[int]
    accepted: list[int]
    """Tokens kept of each draft, in order; empty without speculation."""


def continue_all(llm: Any, prompts: Sequence[list[int]], parameters: Any) -> list[Continuation]:
    """The first continuation of each prompt, all handed to vLLM at one time."""
    outputs = llm.generate(
        [{"prompt_token_ids": token_ids} for token_ids in prompts], parameters, use_tqdm=False
    )
    completions = [output.outputs[0] for output in outputs]
    return [
        Continuation(
            list(done.token_ids),
            list(done.spec_decode_metrics.per_step_accepted) if done.spec_decode_metrics else [],
        )
        for done in completions
    ]
