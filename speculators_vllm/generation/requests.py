"""Options of a request for hidden states."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypedDict

from speculators_core.data_generation.examples import Example
from speculators_vllm.generation.arrivals import Outcome


class Sampling(TypedDict):
    """Under the names that `vllm.SamplingParams` and vLLM's server have in common."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    top_k: int
    min_p: float
    repetition_penalty: float
    ignore_eos: bool
    stop_token_ids: list[int]


@dataclass(frozen=True)
class RequestOptions:
    """How a request is sampled, and which of its states it gets."""

    sampling: Sampling
    kv_transfer_params: dict[str, str]
    """A `hidden_states.settings.RequestOptions`, as JSON."""


Running = Generator[int, None, dict[str, Outcome]]
"""Numbers of tokens, each since the one before; the outcomes by key are returned at the end."""
OptionsOf = Callable[[str, Example], RequestOptions]
"""The options of a request by its name and example."""
