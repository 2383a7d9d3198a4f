"""Running servers as an engine."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.acceptance import live
from benchmarks.acceptance.engines import Decoding, Done, Draft, Engine, Runner
from benchmarks.acceptance.settings import ServerConfig
from speculators_core.decoding.prompts import TokenizedPrompt
from speculators_core.diagnosis.acceptance_report import Counters, RequestRecord


@dataclass(frozen=True)
class LiveEngine(Engine):
    """A server that speculates, and one that does not; neither is started or stopped here."""

    server: live.Server
    baseline: live.Server | None
    concurrency: int
    config: ServerConfig

    @contextmanager
    def loaded(self, draft: Draft | None) -> Iterator[Runner]:
        server = self.baseline if draft is None else self.server
        assert server is not None
        runner = _LiveRunner(server, self.concurrency, self.config)
        runner.counters()  # from here on it knows what to wait for
        yield runner


@dataclass
class _LiveRunner(Runner):
    server: live.Server
    concurrency: int
    config: ServerConfig
    awaited_tokens: int = 0
    """The server's count of tokens, once it has counted those that arrived here."""

    def run(
        self, prompts: Sequence[TokenizedPrompt], decoding: Decoding, done: Done
    ) -> list[RequestRecord]:
        records = asyncio.run(
            live.complete_all(self.server, self.config, prompts, decoding, self.concurrency, done)
        )
        self.awaited_tokens += sum(len(record.output_ids) for record in records)
        return records

    def counters(self) -> Counters:
        found = asyncio.run(live.fetch_counters(self.server, self.config, self.awaited_tokens))
        self.awaited_tokens = found.generation_tokens
        return found
