"""Settings of ``speculators acceptance``."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from speculators_core.errors import SpeculatorError
from speculators_core.flags import JsonOptions, Several, Switch, group
from speculators_core.settings import Settings


class ServerConfig(Settings):
    """Running servers to measure, instead of an engine in this process."""

    base_url: str | None = None
    """URL of a vLLM server with a speculator, http://host:port; it decides draft, K and dtype."""
    baseline_url: str | None = None
    """URL of the same server without speculation, to compare speed and outputs with."""
    api_key: str | None = Field(None, exclude=True, repr=False)
    """API key of the servers; the variable `OPENAI_API_KEY` if not set."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest silence of a server, in seconds, before a request counts as failed."""


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
    """`playground`, a file of JSON lines (also .gz or .zst) or Parquet, or a hub data set."""
    template_options: JsonOptions = Field(default_factory=dict)
    """Variables of the chat template for all prompts, such as `{"enable_thinking": false}`; those
    in a prompt's `chat_template_kwargs` take precedence."""
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
    """Folder for report.json and the plot: acceptance.png and, for dark backgrounds,
    acceptance-dark.png."""
    report: Path | None = None
    """A report.json of an earlier measurement: print its tables and draw its plot again, into its
    folder or --output. Nothing is measured."""
    verbose: Annotated[bool, Switch] = False
    """Print vLLM's output while it starts, instead of writing it to a log file."""

    @property
    def runs_vllm(self) -> bool:
        """Whether vLLM is to run in this process."""
        return self.engine == "vllm" and self.server.base_url is None and self.report is None

    def check(self) -> None:
        """Raises SpeculatorError for options that do not go together."""
        if self.report is not None:
            self._check_alone()
        if self.engine_args and self.engine == "transformers":
            raise SpeculatorError(
                f"--engine-args {', '.join(self.engine_args)}: these are arguments of vLLM, which "
                "--engine transformers does not run. Leave them out, or pass --engine vllm."
            )
        if self.server.base_url is None:
            self._check_engine()
        else:
            self._check_served()

    def _check_alone(self) -> None:
        """With a report, nothing is measured."""
        stated = {**self.stated(), **self.server.stated()}
        others = sorted(set(stated) - {"report", "output", "verbose", "server"})
        if others:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise SpeculatorError(
                f"{names}: without effect with --report, which measures nothing. Leave it out, or "
                "leave out --report to measure."
            )

    def _check_engine(self) -> None:
        """For an engine in this process."""
        of_servers = {"--baseline-url": self.server.baseline_url, "--api-key": self.server.api_key}
        for option, value in of_servers.items():
            if value:
                raise SpeculatorError(
                    f"{option} belongs to a server. Pass its URL as --base-url, or leave it out."
                )
        on_vllm = self.engine == "vllm"
        if "assisted" in self.model and (on_vllm or self.concurrency > 1):
            raise SpeculatorError(
                "assisted is decoding of Transformers, one request at a time: use it with "
                "--engine transformers --concurrency 1."
            )
        if "prompt-lookup" in self.model and on_vllm and len(self.k) > 1:
            raise SpeculatorError(
                "vLLM 0.32 cannot start again in a process that ran its prompt lookup: pass one "
                f"number to --k, found {' '.join(map(str, self.k))}."
            )

    def _check_served(self) -> None:
        """For running servers."""
        decided: dict[str, object] = {
            "--k": self.k,
            "--dtype": self.dtype,
            "--engine-args": self.engine_args,
            "--engine transformers": self.engine == "transformers",
        }
        if found := [option for option, value in decided.items() if value]:
            raise SpeculatorError(
                f"{', '.join(found)}: decided by the server at --base-url when it is started. "
                "Leave this out."
            )
        if len(self.model) > 1:
            raise SpeculatorError(
                f"--base-url serves one draft, found {len(self.model)} names in --model."
            )
