"""What a verifier is asked, how it answers, and what lets it answer."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from cyclopts import Parameter
from pydantic import Field

from speculators_core.settings import Settings

if TYPE_CHECKING:
    from speculators_core.data_generation.answers.dialogues import Dialogue


class SamplingConfig(Settings):
    """How the verifier chooses its words."""

    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Mass of the tokens that are drawn from."""
    top_k: int | None = Field(None, ge=1)
    """Tokens that are drawn from, at most; a server's own number where None."""
    max_tokens: int = Field(1024, ge=1)
    """Tokens of an answer, at most."""
    seed: int = Field(0, ge=0)
    """Of sampling; each answer's own is derived from it, the conversation's key and the turn."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """More variables of the chat template, as JSON: `{"enable_thinking": false}`."""


class EndpointConfig(Settings):
    """A server that speaks OpenAI's protocol."""

    base_url: str | None = Field(None, pattern=r"^https?://[^/@]+(/[^@]*)?$")
    """Of the server, `http://host:port/v1`; no key is part of it."""
    model: str | None = None
    """The server's name for the verifier; `verifier`, or the only one it has, where None."""
    api_key: str | None = Field(None, exclude=True, repr=False)
    """Of the server; OPENAI_API_KEY where None. Never written."""
    concurrency: int = Field(32, ge=1)
    """Conversations that the server answers at one time."""
    retries: int = Field(6, ge=0)
    """Further attempts, with growing pauses, where the server is busy, broken or silent."""
    timeout_s: float = Field(600.0, gt=0)
    """Time that the server has for an answer."""


class OfflineConfig(Settings):
    """An engine of our own."""

    engine_args: dict[str, Any] = Field(default_factory=dict)
    """More arguments of vLLM's `LLM`, as JSON."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the verifier; its own with `auto`."""
    batch_size: int = Field(256, ge=1)
    """Conversations that go on at one time."""
    reasoning_parser: str | None = None
    """vLLM's name of what tells thoughts from answers; all is the answer where None."""
    tool_call_parser: str | None = None
    """vLLM's name of what finds tool calls in answers; they are found nowhere where None."""


class AnswersConfig(Settings):
    """Who answers, and how."""

    engine: str | None = None
    """`openai` for a server, `vllm` for an engine in this process, or what another package
    registers in `speculators.answerers`; openai with `base_url` and else vllm where None."""
    verifier: str | None = None
    """Folder or hub id."""
    sampling: Annotated[SamplingConfig, Parameter(name="*")] = SamplingConfig()
    endpoint: Annotated[EndpointConfig, Parameter(name="*")] = EndpointConfig()
    offline: Annotated[OfflineConfig, Parameter(name="*")] = OfflineConfig()

    @property
    def engine_name(self) -> str:
        return self.engine or ("vllm" if self.endpoint.base_url is None else "openai")


class Answerer(Protocol):
    """What lets a verifier answer; made of an `AnswersConfig`."""

    def answer(self, dialogues: Iterator["Dialogue"]) -> Iterator["Dialogue"]:
        """The same dialogues in the same order, each when it has ended.

        Only so many are taken ahead as make it fast. One that has ended before is handed on.

        Raises:
            SpeculatorError: nothing can be answered any more.
        """
        ...

    def close(self) -> None: ...
