"""Everything that changes vLLM, in one place.

Each patch names the function it wraps and the parameters it relies on. Where vLLM's signature is
another, the patch steps aside with a warning and vLLM behaves as it does alone.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

MARK = "_speculators_vllm"


def apply() -> None:
    """Wraps vLLM's functions, once a process."""
    from vllm.engine import arg_utils

    # vLLM 0.32, 0.33: builds the speculative settings from the user's --speculative-config.
    _wrap(
        arg_utils.EngineArgs,
        "create_speculative_config",
        ["self", "target_model_config", "target_parallel_config"],
        _completing_speculative_config,
    )
    # vLLM 0.32 takes a relative verifier from the working directory. 0.33 refuses local verifiers
    # of a speculator on purpose, and there the refusal comes before this wrapper's change.
    _wrap(
        arg_utils,
        "maybe_override_with_speculators",
        [
            "model",
            "tokenizer",
            "trust_remote_code",
            "revision",
            "vllm_speculative_config",
            "hf_token",
            "kwargs",
        ],
        _locating_verifier,
    )


def _wrap(
    owner: Any, name: str, parameters: list[str], wrapper: Callable[[Callable], Callable]
) -> None:
    original = getattr(owner, name, None)
    if getattr(original, MARK, False):
        return
    found = list(inspect.signature(original).parameters) if original is not None else None
    if original is None or found != parameters:
        logger.warning(
            "speculators-vllm left vLLM's %s.%s alone: its parameters are %s, expected %s",
            owner.__name__,
            name,
            found,
            parameters,
        )
        return
    wrapped = functools.wraps(original)(wrapper(original))
    setattr(wrapped, MARK, True)
    setattr(owner, name, wrapped)


def _completing_speculative_config(original: Callable) -> Callable:
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        if self.speculative_config is not None or self.spec_model is not None:
            from speculators_vllm.speculative_config import complete

            by_flag = {
                "method": self.spec_method,
                "model": self.spec_model,
                "num_speculative_tokens": self.spec_tokens,
            }
            self.speculative_config = complete(
                self.speculative_config or {},
                {key: value for key, value in by_flag.items() if value is not None},
                target_model_config.hf_config,
                target_model_config.model,
                self.hf_token,
            )
        return original(self, target_model_config, target_parallel_config)

    return create_speculative_config


def _locating_verifier(original: Callable) -> Callable:
    def maybe_override_with_speculators(model: str, *args: Any, **kwargs: Any) -> Any:
        verifier, tokenizer, speculative_config = original(model, *args, **kwargs)
        if verifier != model:
            from speculators_core.verifier import locate_verifier

            located = locate_verifier(verifier, beside=model)
            tokenizer = located if tokenizer == verifier else tokenizer
            verifier = located
        return verifier, tokenizer, speculative_config

    return maybe_override_with_speculators
