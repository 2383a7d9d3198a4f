"""Settings of ``speculators acceptance``."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from benchmarks.acceptance.wire import ServerConfig
from speculators_core.flags import JsonOptions, Several, Switch, group
from speculators_core.settings import Settings


class AcceptanceConfig(Settings):
    """What to measure, and on what."""

    model: Annotated[tuple[str, ...], Several] = ()
    """Drafts to compare: speculators or language models (folders or hub ids), `prompt-lookup`, and
    `assisted` (the prompt lookup of Transformers); the playground's speculators if not set. With
    --base-url, the name of what that server runs."""
    verifier: str | None = None
    """Folder or hub id of the verifier; the one that the speculator or the server names if not
    set."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """`vllm`, or `transformers` for the reference decoder."""
    prompts: str = "playground"
    """`playground`, a JSONL file, or a hub data set."""
    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Several] = ()
    """Numbers of speculative tokens to measure; the checkpoint's number if not set."""
    temperature: float = Field(0.0, ge=0.0)
    """Sampling temperature; 0 is greedy. Sampled outputs are not compared."""
    max_tokens: int = Field(128, ge=1)
    """Maximum number of new tokens for each prompt."""
    limit_per_category: int | None = Field(None, ge=1)
    """Maximum number of prompts of each category."""
    runs: int = Field(1, ge=1)
    """Repetitions of everything; speeds are medians."""
    concurrency: int = Field(1, ge=1)
    """Requests at the same time."""
    seed: int = 0
    """Seed for sampling; each further run adds one."""
    ignore_eos: bool = False
    """Continue after the end of a text, up to `max_tokens`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Dtype of both models; float32 on a CPU and auto on a GPU if not set."""
    engine_args: JsonOptions = Field(default_factory=dict)
    """Further arguments of vLLM's `LLM`, as JSON or as single flags
    (`--engine-args.max-model-len 4096`)."""
    server: Annotated[ServerConfig, Parameter(name="*", group=group("Server", ServerConfig))] = (
        ServerConfig()
    )
    """Servers to measure instead of an engine in this process."""
    output: Path | None = None
    """Folder for report.json and acceptance.png."""
    verbose: Annotated[bool, Switch] = False
    """Print vLLM's output while it starts, instead of writing it to a log file."""
