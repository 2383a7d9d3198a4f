"""A vLLM server that somebody started, asked over HTTP.

Prompts go to ``/v1/completions`` as token ids, and token ids come back as they are made. How many
tokens of each draft were kept comes with the answer if the server runs with
``--per-request-spec-decode-metrics``; otherwise its counters at ``/metrics`` hold the sum.
"""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic import BaseModel, JsonValue

from benchmarks.acceptance.engines import Decoding, Done
from benchmarks.acceptance.settings import ServerConfig
from speculators_core.decoding.prompts import TokenizedPrompt
from speculators_core.diagnosis.acceptance_report import Counters, RequestRecord, Timing
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.format import checkpoint
from speculators_core.format.stored_speculator import StoredSpeculator
from speculators_core.http import Access, Client, VLLMModels

COUNTERS_WITHIN_S = 2.0
"""Time in which counters reach the tokens that have already arrived."""


@dataclass(frozen=True)
class Server:
    """A server, as its pages describe it."""

    url: str
    version: str
    model: str
    """The name that requests carry."""
    root: str
    """Folder or hub id that the name stands for."""
    max_model_len: int
    has_prefix_cache: bool | None
    speculative_tokens: int
    """0 without speculation."""


class _Version(BaseModel):
    version: str


class _Drafts(BaseModel):
    acceptance_histogram: list[int]
    per_step_accepted: list[int] | None = None

    @property
    def accepted(self) -> list[int]:
        """Tokens kept of each draft, in order if ``per_step_accepted`` is there."""
        if self.per_step_accepted is not None:
            return self.per_step_accepted
        return [kept for kept, times in enumerate(self.acceptance_histogram) for _ in range(times)]


class _Metrics(BaseModel):
    speculative_decoding: _Drafts | None = None


class _Choice(BaseModel):
    token_ids: list[int]
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Chunk(BaseModel):
    """One event of a streamed completion."""

    choices: list[_Choice] = []
    metrics: _Metrics | None = None
    error: JsonValue = None


def find(config: ServerConfig, verifier: str | None) -> tuple[str, dict[str, Server]]:
    """The verifier, and the servers: ``speculating``, and ``baseline`` where there is one.

    Raises:
        SpeculatorError: a server is not within reach, wants another key, is not vLLM's or does not
            do its part; or the two differ in more than speculation.
    """
    assert config.base_url is not None
    server = inspect(config.base_url, config)
    if not server.speculative_tokens:
        raise SpeculatorError(
            f"{server.url} counts no drafts at /metrics. Start it with --speculative-config and "
            "without --disable-log-stats."
        )
    found = verifier or _verifier_of(server)
    if config.baseline_url is None:
        return found, {"speculating": server}
    baseline = inspect(config.baseline_url, config)
    _check_baseline(baseline, server)
    if (alone := verifier or _verifier_of(baseline)) != found:
        raise SpeculatorError(
            f"{server.url} serves {found} and {baseline.url} {alone}; expected the same verifier. "
            "Pass --verifier if these are two names of one."
        )
    return found, {"speculating": server, "baseline": baseline}


def inspect(url: str, config: ServerConfig) -> Server:
    """The server at ``url``, as its pages describe it."""
    return asyncio.run(_inspect(_checked_url(url), config))


def _access(config: ServerConfig, url: str, connections: int = 1) -> Access:
    return Access(url, config.api_key, config.timeout_s, connections)


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        extra = parts.path not in ("", "/") or parts.query or parts.fragment
    except ValueError:  # the port is not a number
        whole, extra = False, ""
    if "@" in url:
        raise SpeculatorError(
            "The server's URL holds credentials, which a report would show. Pass --api-key instead."
        )
    if not whole or extra:
        raise SpeculatorError(f"{url}: expected a server as http://host:port, without a path.")
    return url.rstrip("/")


async def _inspect(url: str, config: ServerConfig) -> Server:
    async with Client(_access(config, url)) as client:
        version = await client.ask(_Version, "/version")
        model = (await client.ask(VLLMModels, "/v1/models")).base
        metrics = (await client.read("/metrics")).decode("utf-8", "replace")
    caching = re.search(r'enable_prefix_caching="(True|False)"', metrics)
    return Server(
        url=url,
        version=version.version,
        model=model.id,
        root=model.root or model.id,
        max_model_len=model.max_model_len,
        has_prefix_cache=None if caching is None else caching[1] == "True",
        speculative_tokens=len(read_counters(metrics).accepted_per_position),
    )


def _check_baseline(baseline: Server, server: Server) -> None:
    """Raises SpeculatorError unless the two differ in nothing but speculation."""
    if baseline.speculative_tokens:
        raise SpeculatorError(
            f"--baseline-url {baseline.url} speculates; expected a server without "
            "--speculative-config. Start it without."
        )
    for what in ("version", "max_model_len", "has_prefix_cache"):
        ours, alone = getattr(server, what), getattr(baseline, what)
        if ours != alone:
            raise SpeculatorError(
                f"{what} is {ours} at {server.url} and {alone} at {baseline.url}; expected servers "
                "that differ in speculation alone. Start both with the same arguments."
            )


def _verifier_of(server: Server) -> str:
    """The verifier that a server runs, under the name or path that it was started with."""
    try:
        if not checkpoint.is_speculator(checkpoint.fetch_config(server.root)):
            return server.root
        speculator = StoredSpeculator.open(server.root, [checkpoint.CONFIG])
    except SpeculatorError as error:
        raise SpeculatorError(
            f"{server.url} serves {server.root}, whose tokenizer is not within reach here "
            f"({first_line(error).rstrip('.')}). Pass --verifier with a folder or hub id that is."
        ) from error
    return speculator.verifier


def remarks(what: str, runs: Sequence[Sequence[RequestRecord]], counters: Counters) -> list[str]:
    """What to know about a server's figures; ``what`` is with or without speculation."""
    ours = [record for run in runs for record in run]
    found = []
    if any(record.accepted for record in ours):
        found.append("drafts are counted by request, as the server reports with each answer")
    elif counters.num_drafts:
        found.append(
            "drafts are counted by the server's /metrics, for all requests together; a server "
            "with --per-request-spec-decode-metrics detailed reports them by request"
        )
    others = counters.generation_tokens - sum(len(record.output_ids) for record in ours)
    if others:
        found.append(
            f"the server {what} counted {others:+} tokens in addition to these {len(ours)} "
            "requests: somebody else used it, so speeds and drafts counted by its /metrics are not "
            "of these prompts alone"
        )
    if counters.cached_prompt_tokens:
        share = counters.cached_prompt_tokens / counters.prompt_tokens
        found.append(f"{share:.1%} of prompt tokens {what} came from the prefix cache")
    return found


async def fetch_counters(server: Server, config: ServerConfig, at_least: int) -> Counters:
    """The server's counters, once they hold so many tokens or have had time to."""
    deadline = time.monotonic() + COUNTERS_WITHIN_S
    async with Client(_access(config, server.url)) as client:
        while True:
            found = read_counters((await client.read("/metrics")).decode("utf-8", "replace"))
            if found.generation_tokens >= at_least or time.monotonic() > deadline:
                return found
            await asyncio.sleep(COUNTERS_WITHIN_S / 20)


async def complete_all(
    server: Server,
    config: ServerConfig,
    prompts: Sequence[TokenizedPrompt],
    decoding: Decoding,
    concurrency: int,
    done: Done,
) -> list[RequestRecord]:
    """Continuations of all prompts, with ``concurrency`` requests in flight.

    Raises:
        SpeculatorError: a request failed; it names the prompt, and ends the others.
    """
    records: dict[int, RequestRecord] = {}
    waiting = iter(enumerate(prompts, 1))
    began = time.perf_counter()

    async def work(client: Client) -> None:
        for number, prompt in waiting:
            try:
                records[number] = await _complete(client, server, prompt, decoding, began)
            except SpeculatorError as error:
                raise SpeculatorError(f"prompt {number} at {error}") from error
            done()

    async with Client(_access(config, server.url, concurrency)) as client:
        workers = [asyncio.create_task(work(client)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return [records[number] for number in sorted(records)]


async def _complete(
    client: Client, server: Server, prompt: TokenizedPrompt, decoding: Decoding, began: float
) -> RequestRecord:
    path = "/v1/completions"
    where = f"{server.url}{path}"
    output_ids: list[int] = []
    accepted: list[int] = []
    is_in_order = True
    sent = time.perf_counter()
    first_token = last_token = sent
    is_finished = False
    events = client.events(path, _request(server, prompt, decoding))
    async with aclosing(events):
        async for event in events:
            chunk = client.parse(_Chunk, event, path)
            if chunk.error is not None:
                raise SpeculatorError(f"{where}: {client.shown(json.dumps(chunk.error))}")
            if chunk.metrics and chunk.metrics.speculative_decoding:
                drafts = chunk.metrics.speculative_decoding
                accepted, is_in_order = drafts.accepted, drafts.per_step_accepted is not None
            for choice in chunk.choices:
                if choice.prompt_token_ids not in (None, prompt.token_ids):
                    raise SpeculatorError(f"{where}: the server changed the prompt.")
                if choice.token_ids:
                    last_token = time.perf_counter()
                    first_token = first_token if output_ids else last_token
                output_ids += choice.token_ids
                is_finished |= choice.finish_reason is not None
    if not is_finished or not output_ids:
        raise SpeculatorError(f"{where}: the answer broke off after {len(output_ids)} tokens.")
    return RequestRecord(
        category=prompt.category,
        num_prompt_tokens=len(prompt.token_ids),
        output_ids=output_ids,
        accepted=accepted,
        is_in_order=is_in_order,
        seconds=last_token - sent,
        timing=Timing(start_s=sent - began, first_token_s=first_token - sent),
    )


def _request(server: Server, prompt: TokenizedPrompt, decoding: Decoding) -> dict[str, JsonValue]:
    return {
        "model": server.model,
        "prompt": [*prompt.token_ids],
        "max_tokens": min(decoding.max_tokens, server.max_model_len - len(prompt.token_ids)),
        "seed": decoding.seed,
        "ignore_eos": decoding.ignore_eos,
        "temperature": decoding.temperature,
        # Where these are not stated, a server takes the verifier's generation_config.json.
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},  # the last event, which has the drafts' counts
        "return_token_ids": True,
    }


def read_counters(metrics: str) -> Counters:
    """Sums over all engines of a server, from its page of Prometheus metrics."""
    totals: dict[str, float] = {}
    for name, labels, value in _COUNTER.findall(metrics):
        position = _POSITION.search(labels)
        key = f"{name} {position[1]}" if position else name
        totals[key] = totals.get(key, 0.0) + float(value)
    kept = "spec_decode_num_accepted_tokens_per_pos"
    num_positions = sum(key.startswith(f"{kept} ") for key in totals)
    return Counters(
        num_drafts=int(totals.get("spec_decode_num_drafts", 0)),
        accepted_per_position=tuple(
            int(totals.get(f"{kept} {position}", 0)) for position in range(num_positions)
        ),
        generation_tokens=int(totals.get("generation_tokens", 0)),
        prompt_tokens=int(totals.get("prefix_cache_queries", 0)),
        cached_prompt_tokens=int(totals.get("prefix_cache_hits", 0)),
    )


_COUNTER = re.compile(r"^vllm:(\w+)_total(\{.*\})? (\S+)$", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')
