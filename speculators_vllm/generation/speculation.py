"""Verifier and draft on vLLM, for the inference engine."""

from collections.abc import Sequence
from contextlib import ExitStack

from pydantic import JsonValue

from speculators_core.decoding.acceptance import AcceptanceCounts
from speculators_core.decoding.inference import Continued, SpeculativeConfig
from speculators_core.format import checkpoint
from speculators_vllm import offline


class VLLMSpeculation:
    """Two models in one engine of this process; vLLM verifies exactly."""

    def __init__(self, config: SpeculativeConfig) -> None:
        """Raises:
        SpeculatorError: there is no vLLM, or it does not start with these models.
        """
        offline.prepare(verbose=False)
        main, draft = config.names
        speculation: dict[str, JsonValue] = {
            "model": draft,
            "num_speculative_tokens": config.max_speculative_tokens,
        }
        if not _is_speculator(draft):
            speculation["method"] = "draft_model"
        with ExitStack() as stack:
            self._llm = stack.enter_context(
                offline.loaded(
                    model=main,
                    dtype=config.dtype,
                    speculative_config=speculation,
                    **offline.default_arguments(),
                )
            )
            self._stack = stack.pop_all()

    def continue_all(
        self, prompts: Sequence[list[int]], config: SpeculativeConfig
    ) -> list[Continued]:
        from vllm import SamplingParams  # after `prepare`

        parameters = SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p if config.temperature else 1.0,
            top_k=config.top_k or 0 if config.temperature else 0,
            max_tokens=config.max_new_tokens,
            seed=config.seed,
        )
        return [
            Continued(one.token_ids, AcceptanceCounts(config.max_speculative_tokens, one.accepted))
            for one in offline.continue_all(self._llm, prompts, parameters)
        ]

    def close(self) -> None:
        self._stack.close()


def _is_speculator(name: str) -> bool:
    """Whether a draft is a trained speculator, of which vLLM reads the method."""
    return checkpoint.is_speculator(
        checkpoint.read_config(checkpoint.fetch(name, [checkpoint.CONFIG]))
    )
