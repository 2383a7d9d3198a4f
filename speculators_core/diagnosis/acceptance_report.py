"""Records of the report of ``speculators acceptance``."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from speculators_core.decoding.acceptance import reached_and_kept


class Timing(BaseModel):
    """When a server answered a request that it ran beside others."""

    model_config = ConfigDict(frozen=True)
    start_s: float
    """Start, since the run's first request."""
    first_token_s: float
    """First token, since the request was sent."""


class RequestRecord(BaseModel):
    """What one request did: enough to recompute every figure."""

    model_config = ConfigDict(frozen=True)
    category: str
    num_prompt_tokens: int
    output_ids: list[int]
    accepted: list[int]
    """Tokens kept of each draft; empty without speculation, or where nobody reports them."""
    is_in_order: bool = True
    """Whether the drafts are in order; those of a server's histogram are not."""
    seconds: float
    """Seconds from request to last token; requests that were handed over together share them."""
    timing: Timing | None = None
    """Times of a request to a server, whose requests overlap."""


class Counters(BaseModel):
    """Counts of a server over all its requests, including other clients'."""

    model_config = ConfigDict(frozen=True)
    num_drafts: int
    accepted_per_position: tuple[int, ...]
    """One entry for each speculative token; none without speculation."""
    generation_tokens: int
    prompt_tokens: int
    """Those that the prefix cache was asked for."""
    cached_prompt_tokens: int

    def __sub__(self, before: "Counters") -> "Counters":
        kept = zip(self.accepted_per_position, before.accepted_per_position, strict=True)
        return Counters(
            num_drafts=self.num_drafts - before.num_drafts,
            accepted_per_position=tuple(after - earlier for after, earlier in kept),
            generation_tokens=self.generation_tokens - before.generation_tokens,
            prompt_tokens=self.prompt_tokens - before.prompt_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens - before.cached_prompt_tokens,
        )


class Latency(BaseModel):
    """Percentiles over requests, in seconds."""

    model_config = ConfigDict(frozen=True)
    first_token_s: dict[str, float]
    """TTFT: from request to first token."""
    per_token_s: dict[str, float]
    """TPOT: from first to last token, over the tokens after the first."""
    tokens_per_s_per_user: float
    """Median of a request's tokens over its seconds, prefill included."""


class Summary(BaseModel):
    """Figures of some requests at one number of speculative tokens."""

    model_config = ConfigDict(frozen=True)
    num_requests: int
    num_drafts: int
    accepted_per_position: list[int]
    acceptance_length: float
    """1 + accepted / drafts over all requests (pooled)."""
    joint_rates: list[float]
    """Share of drafts whose positions 1 to k were all kept."""
    conditional_rates: list[float | None]
    """Share kept at k of the drafts kept up to k - 1; None where there were none."""
    histogram: list[float]
    """Share of drafts with 0, 1, ... K tokens kept."""

    @property
    def reached_and_kept(self) -> list[tuple[int, int]]:
        """For each position, the drafts that reached it and those kept there."""
        return reached_and_kept(self.num_drafts, self.accepted_per_position)


class KReport(BaseModel):
    """Everything about one number of speculative tokens."""

    speculative_tokens: int
    counted: Literal["by request", "by server"]
    """Source of the counts. Those of a whole server give no figures by category and no interval."""
    pooled: Summary
    interval_95: tuple[float, float] | None
    macro_acceptance_length: float | None
    categories: dict[str, Summary]
    contexts: dict[str, Summary] = {}
    """Figures by the number of tokens before the draft, in the ranges of `CONTEXT_BUCKETS` with
    drafts; empty where the order of drafts is unknown."""
    tokens_per_s: list[float]
    """Speed of each run."""
    speed_up: float | None
    """Median tokens/s over the median without speculation; None where that was not measured."""
    speed_up_interval_95: tuple[float, float] | None = None
    """Over prompts; None where requests overlap or nothing ran without speculation."""
    num_identical: int | None
    """Outputs equal to those without speculation; None where there are none or they are sampled."""
    first_differences: dict[int, int]
    """Request to the first output position that differs."""
    repeated_8_grams: float
    without_loops: Summary
    """Figures of the requests with under a tenth of repeated 8-grams: loops flatter a draft."""
    without_loops_interval_95: tuple[float, float] | None = None
    """None where there are no such requests, or their drafts are not known one by one."""
    without_loops_contexts: dict[str, Summary] = {}
    """As ``contexts``, of these requests."""
    latency: Latency | None
    requests: list[RequestRecord]
    counters: Counters | None
    """Counts of the server meanwhile, including other clients' requests."""

    @property
    def first_run(self) -> list[RequestRecord]:
        return self.requests[: len(self.requests) // len(self.tokens_per_s)]


class DraftReport(BaseModel):
    """Everything about one draft."""

    name: str
    kind: str
    sha256: str | None
    by_k: list[KReport]

    @property
    def short_name(self) -> str:
        return Path(self.name).name


class AcceptanceReport(BaseModel):
    """All counts and figures of one measurement."""

    settings: dict[str, Any]
    verifier: str
    verifier_sha256: str | None
    environment: dict[str, str]
    prompts_sha256: str
    counting_rule: str = (
        "a request's first token belongs to no draft; its last step counts whole, accepted tokens "
        "beyond max_tokens included"
    )
    baseline_tokens_per_s: list[float]
    """Speed of each run without speculation; empty where there was none."""
    baseline_requests: list[RequestRecord]
    baseline_latency: Latency | None = None
    drafts: list[DraftReport]
    servers: dict[str, dict[str, Any]] = {}
    """Descriptions that the servers gave."""
    remarks: list[str] = []
    """Reservations about the figures."""
