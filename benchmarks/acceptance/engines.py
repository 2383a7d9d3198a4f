"""What a measurement asks of an engine."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from speculators_core.decoding.prompts import TokenizedPrompt
from speculators_core.diagnosis.acceptance_report import Counters, RequestRecord

WARM_UP_TOKENS = 8
MAX_MATCHED, MIN_MATCHED = 3, 1
"""Tokens that prompt lookup looks for."""

Kind = Literal["speculator", "language-model", "prompt-lookup", "assisted", "served"]
Done = Callable[[], None]
"""Called after each request."""


@dataclass(frozen=True)
class Draft:
    """What proposes tokens, and how many in one step."""

    kind: Kind
    name: str
    """Folder or hub id of a speculator or a language model, or a server; else the kind itself."""
    speculative_tokens: int


@dataclass(frozen=True)
class Decoding:
    """How each prompt is continued."""

    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool


class Runner(Protocol):
    """A loaded verifier, with a draft or without."""

    def run(
        self, prompts: Sequence[TokenizedPrompt], decoding: Decoding, done: Done
    ) -> list[RequestRecord]: ...

    def counters(self) -> Counters | None:
        """What a server has counted so far; None where all counts come with the requests."""
        return None


class Engine(Protocol):
    """Loads a verifier."""

    def loaded(self, draft: Draft | None) -> AbstractContextManager[Runner]:
        """The verifier with a draft, or alone."""


def warm_up(runner: Runner, prompts: Sequence[TokenizedPrompt], decoding: Decoding) -> None:
    """Runs one short request that no figure counts."""
    short = Decoding(WARM_UP_TOKENS, decoding.temperature, decoding.seed, ignore_eos=True)
    runner.run(prompts[:1], short, lambda: None)
