"""vLLM inside this process: loads an engine, runs token ids through it, shuts it down."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from speculators_core.errors import SpeculatorError
from speculators_vllm import openmp

CPU_KV_CACHE_GIB = "1"
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


@contextmanager
def loaded(**arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM` of these arguments, which says of each request what it kept of each draft."""
    from vllm import LLM

    if arguments.get("speculative_config") is not None:
        arguments["per_request_spec_decode_metrics"] = "detailed"
    llm = LLM(**arguments)
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
