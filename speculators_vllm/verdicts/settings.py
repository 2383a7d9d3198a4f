"""Settings of ``speculators check`` and ``speculators certify``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from speculators_core.flags import AsJson, JsonOptions, Several, Switch
from speculators_core.settings import Settings

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Arguments = dict[str, Any]
"""Arguments of vLLM by name; it checks their types."""


class CheckConfig(Settings):
    """Verifier, prompts and engine to check a speculator with."""

    verifier: str | None = None
    """Verifier; the one that the speculator names if not set."""
    prompts: str | None = None
    """JSON lines (also .gz or .zst), Parquet, or a hub data set; a dozen general prompts if not
    set."""
    template_options: JsonOptions = Field(default_factory=dict)
    """Variables of the chat template for all prompts, such as `{"enable_thinking": false}`; those
    in a prompt's `chat_template_kwargs` take precedence."""
    limit_per_category: int | None = Field(None, ge=1)
    """Maximum number of prompts of each category."""
    max_tokens: int = Field(48, ge=8)
    """New tokens for each prompt."""
    k: int | None = Field(None, ge=1)
    """Speculative tokens; the checkpoint's number if not set."""
    dtype: Dtype | None = None
    """Dtype of both models; float32 on a CPU and `auto` on a GPU if not set."""
    engine_args: JsonOptions = Field(default_factory=dict)
    """Further arguments of vLLM's `LLM`, as JSON or as one flag for each
    (`--engine-args.max-model-len 4096`)."""
    verbose: Annotated[bool, Switch] = False
    """Print vLLM's output while it starts, instead of writing it to a log file."""
    as_json: AsJson = False
    """Print the report as JSON."""


class CertifyConfig(Settings):
    """Verifier, prompts and tests of a certificate."""

    verifier: str | None = None
    """Verifier; the one that the speculator names if not set."""
    prompts: str | None = None
    """JSON lines (also .gz or .zst), Parquet, or a hub data set; a dozen general prompts if not
    set."""
    template_options: JsonOptions = Field(default_factory=dict)
    """Variables of the chat template for all prompts, such as `{"enable_thinking": false}`; those
    in a prompt's `chat_template_kwargs` take precedence."""
    flags: Annotated[tuple[JsonOptions, ...], Several] = ()
    """Sets of vLLM's arguments, each as JSON, with `concurrency` for the number of requests at one
    time and `thinking_token_budget` of each. If not set: no arguments, no prefix caching, chunked
    prefill with a small budget, 8 requests at one time, and with a reasoning parser a budget of
    thinking tokens. Tokens are sampled with the first set."""
    engine_args: JsonOptions = Field(default_factory=dict)
    """Arguments of vLLM's `LLM` for every set, as JSON or as one flag for each
    (`--engine-args.max-model-len 4096`)."""
    speculative_config: JsonOptions = Field(default_factory=dict)
    """Keys of vLLM's speculative config that override the checkpoint's, as JSON or as one
    flag for each (`--speculative-config.num-speculative-tokens 2`)."""
    dtypes: Annotated[tuple[Dtype, ...], Several, Field(min_length=1)] = ("float32", "auto")
    """Dtypes of both models; `auto` is the verifier's."""
    max_tokens: int = Field(64, ge=2)
    """Maximum number of new tokens of each greedy output."""
    near_tie: float | None = Field(None, ge=0.0)
    """Bound on a logit gap in dtypes other than float32; by dtype if not set."""
    draws: int = Field(500, ge=50)
    """Continuations to sample of each prompt."""
    sampled_prompts: int = Field(4, ge=1)
    """Number of prompts to sample from, spread over all of them."""
    significance: float = Field(1e-3, gt=0.0, lt=0.5)
    """Probability that a lossless engine fails any of the tests of sampled tokens."""
    seed: int = Field(0, ge=0)
    """Seed of the engines."""
    output: Path | None = None
    """Folder for certificate.json and certificate.html."""
    verbose: Annotated[bool, Switch] = False
    """Print vLLM's output while it starts, instead of writing it to a log file."""
    as_json: AsJson = False
    """Print the certificate as JSON, nothing else."""
