"""Settings of answers: engine, sampling, server and output."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from speculators_core.flags import JsonOptions, Several, Switch, group
from speculators_core.settings import Settings


class SamplingConfig(Settings):
    """Sampling of the answers."""

    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: probability mass to sample from."""
    top_k: int | None = Field(None, ge=1)
    """Number of tokens to sample from; the server's default if not set."""
    max_tokens: int = Field(1024, ge=1)
    """Maximum number of tokens of an answer."""
    seed: int = Field(0, ge=0)
    """Seed for sampling; that of each answer is derived from it, the conversation's key and the
    turn."""
    template_options: JsonOptions = Field(default_factory=dict)
    """Further variables of the chat template, as JSON or as single flags
    (`--template-options.enable-thinking false`)."""


class EndpointConfig(Settings):
    """Server with OpenAI's API, for engine `openai`."""

    base_url: str | None = Field(None, pattern=r"^https?://[^/@]+(/[^@]*)?$")
    """URL of the server, `http://host:port/v1`, without a key."""
    model: str | None = None
    """Name of the verifier on the server; `verifier`, or the server's only model, if not set."""
    api_key: str | None = Field(None, exclude=True, repr=False)
    """API key of the server; the variable `OPENAI_API_KEY` if not set. Never written to disk."""
    concurrency: int = Field(32, ge=1)
    """Conversations that the server answers at the same time."""
    retries: int = Field(6, ge=0)
    """Retries, with growing pauses, if the server is busy, broken or silent."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds that the server has for an answer."""


class OfflineConfig(Settings):
    """Verifier in this process, for engine `vllm`; `transformers` takes dtype and batch size."""

    engine_args: JsonOptions = Field(default_factory=dict)
    """Further arguments of vLLM's `LLM`, as JSON or as single flags
    (`--engine-args.max-model-len 4096`)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the verifier; `auto` is that of its checkpoint."""
    batch_size: int = Field(256, ge=1)
    """Conversations that are answered at the same time."""
    reasoning_parser: str | None = None
    """vLLM's parser that separates reasoning from the answer; all is the answer if not set."""
    tool_call_parser: str | None = None
    """vLLM's parser that finds tool calls in answers; none are looked for if not set."""
    verbose: Annotated[bool, Switch] = False
    """Print vLLM's output while it starts, instead of writing it to a log file."""


class AnswersConfig(Settings):
    """Verifier and the engine that runs it."""

    engine: str | None = None
    """`openai` (a server), `vllm` or `transformers` (in this process), or one of another package
    (group `speculators.answerers`). If not set, `openai` with `base_url` and `vllm` without."""
    verifier: str | None = None
    """Folder or hub id of the verifier."""
    token_ids: Annotated[bool, Switch] = False
    """Write the token ids that the verifier read and wrote, with a loss mask, instead of messages.
    Nothing is tokenised again, and a cut answer that is kept has no made-up end."""
    sampling: Annotated[
        SamplingConfig, Parameter(name="*", group=group("Sampling", SamplingConfig))
    ] = SamplingConfig()
    endpoint: Annotated[
        EndpointConfig, Parameter(name="*", group=group("Server", EndpointConfig))
    ] = EndpointConfig()
    offline: Annotated[OfflineConfig, Parameter(name="*", group=group("vLLM", OfflineConfig))] = (
        OfflineConfig()
    )

    @property
    def engine_name(self) -> str:
        return self.engine or ("vllm" if self.endpoint.base_url is None else "openai")


class RegenerateConfig(Settings):
    """Answers and their output."""

    output: Path
    """JSONL file to write, a conversation per line, as `generate-data` reads it."""
    answers: Annotated[AnswersConfig, Parameter(name="*")] = AnswersConfig()
    cut: Literal["drop", "keep"] = "drop"
    """Treatment of an answer that `max_tokens` cut: end the conversation before it, or after it.
    Without `token_ids`, a kept one is followed by an end of turn from the template that the
    verifier did not write."""
    resume: bool = False
    """Append to the output of an earlier run. Without it, an existing output is refused."""
    max_failures: int = Field(100, ge=0)
    """Maximum number of conversations that may fail to be answered; one more ends the run."""
    allowed_roots: Annotated[tuple[Path, ...], Several] = ()
    """Folders below which data may name other files, such as by links; the current directory if not
    set. The data set and the output may lie anywhere."""
