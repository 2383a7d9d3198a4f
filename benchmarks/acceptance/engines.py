"""What runs the prompts: vLLM here, vLLM as a server, or the reference decoder on Transformers."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from benchmarks.acceptance import live, wire
from benchmarks.acceptance.records import Decoding, Done
from speculators_core.decoding.prompts import TokenizedPrompt
from speculators_core.diagnosis.acceptance_report import Counters, RequestRecord
from speculators_vllm import offline

logger = logging.getLogger(__name__)


WARM_UP_TOKENS = 8


MAX_MATCHED, MIN_MATCHED = 3, 1
"""Tokens that prompt lookup looks for."""


class Runner(Protocol):
    """A loaded verifier, with a speculator or without."""

    def run(
        self, prompts: Sequence[TokenizedPrompt], decoding: Decoding, done: Done
    ) -> list[RequestRecord]: ...

    def counters(self) -> Counters | None:
        """What a server has counted so far; None where each request says all there is."""
        return None


Kind = Literal["speculator", "language-model", "prompt-lookup", "assisted", "served"]


@dataclass(frozen=True)
class Draft:
    """What proposes tokens, and how many in one step."""

    kind: Kind
    name: str
    """Folder or hub id of a speculator or a language model, or a server; else the kind itself."""
    speculative_tokens: int


class Engine(Protocol):
    """Loads a verifier; ``draft`` None means without speculation."""

    def loaded(self, draft: Draft | None) -> Any: ...


@dataclass(frozen=True)
class VLLMEngine:
    """vLLM in this process, `concurrency` requests at a time."""

    verifier: str
    dtype: str
    concurrency: int
    engine_args: dict[str, Any]

    @contextmanager
    def loaded(self, draft: Draft | None) -> Iterator[Runner]:
        arguments: dict[str, Any] = {
            "model": self.verifier,
            "dtype": self.dtype,
            "max_num_seqs": self.concurrency,
            **self.engine_args,
        }
        if draft is not None:
            arguments["speculative_config"] = {
                **_VLLM_METHODS[draft.kind](draft.name),
                "num_speculative_tokens": draft.speculative_tokens,
            }
        with offline.loaded(**arguments) as llm:
            yield _VLLMRunner(llm, self.concurrency)


def _speculator_settings(name: str) -> dict[str, Any]:
    """The folder says it all, to the plug-in; vLLM alone is told what the folder says."""
    if offline.has_plugin():
        return {"model": name}
    from speculators_core.format.checkpoint import fetch_config
    from speculators_vllm.plugin.speculative_config import vllm_settings

    return {"model": name, **vllm_settings(fetch_config(name))}


_VLLM_METHODS: dict[str, Callable[[str], dict[str, Any]]] = {
    "speculator": _speculator_settings,
    "language-model": lambda name: {"model": name, "method": "draft_model"},
    "prompt-lookup": lambda _: {
        "method": "ngram",
        "prompt_lookup_min": MIN_MATCHED,
        "prompt_lookup_max": MAX_MATCHED,
    },
}
"""How vLLM is told of each kind of draft."""


@dataclass(frozen=True)
class _VLLMRunner(Runner):
    llm: Any
    concurrency: int

    def run(
        self, prompts: Sequence[TokenizedPrompt], decoding: Decoding, done: Done
    ) -> list[RequestRecord]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=decoding.temperature,
            max_tokens=decoding.max_tokens,
            seed=decoding.seed,
            ignore_eos=decoding.ignore_eos,
        )
        records = []
        for first in range(0, len(prompts), self.concurrency):
            group = prompts[first : first + self.concurrency]
            start = time.perf_counter()
            outputs = offline.continue_all(
                self.llm, [prompt.token_ids for prompt in group], parameters
            )
            # Requests of a group share its time: their rates add up to the group's.
            seconds = (time.perf_counter() - start) / len(group)
            for prompt, output in zip(group, outputs, strict=True):
                records.append(
                    RequestRecord(
                        category=prompt.category,
                        num_prompt_tokens=len(prompt.token_ids),
                        output_ids=output.token_ids,
                        accepted=output.accepted,
                        seconds=seconds,
                    )
                )
                done()
        return records


@dataclass(frozen=True)
class LiveEngine:
    """A server that speculates, and one that does not; neither is started or stopped here."""

    server: live.Server
    baseline: live.Server | None
    concurrency: int
    settings: wire.ServerConfig

    @contextmanager
    def loaded(self, draft: Draft | None) -> Iterator[Runner]:
        server = self.baseline if draft is None else self.server
        assert server is not None
        runner = _LiveRunner(server, self.concurrency, self.settings)
        runner.counters()  # from here on it knows what to wait for
        yield runner


@dataclass
class _LiveRunner(Runner):
    server: live.Server
    concurrency: int
    settings: wire.ServerConfig
    awaited_tokens: int = 0
    """The server's count of tokens, once it has counted those that arrived here."""

    def run(
        self, prompts: Sequence[TokenizedPrompt], decoding: Decoding, done: Done
    ) -> list[RequestRecord]:
        records = asyncio.run(
            live.complete_all(self.server, self.settings, prompts, decoding, self.concurrency, done)
        )
        self.awaited_tokens += sum(len(record.output_ids) for record in records)
        return records

    def counters(self) -> Counters:
        found = asyncio.run(live.fetch_counters(self.server, self.settings, self.awaited_tokens))
        self.awaited_tokens = found.generation_tokens
        return found


@dataclass(frozen=True)
class TransformersEngine:
    """The reference decoder; without a draft the verifier's own `generate`."""

    verifier: str
    dtype: str
    concurrency: int

    @contextmanager
    def loaded(self, draft: Draft | None) -> Iterator[Runner]:
        import torch

        from speculators_core.decoding.independent import LanguageModelDraft, PromptLookupDraft
        from speculators_core.format.checkpoint import as_dtype
        from speculators_core.models.speculator import SpeculatorModel
        from speculators_core.verifier.reading import load_verifier

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = None if self.dtype == "auto" else as_dtype(self.dtype)
        verifier = load_verifier(self.verifier, dtype).to(device)
        drafter: Any = None
        if draft is not None and draft.kind == "speculator":
            drafter = SpeculatorModel.from_pretrained(
                draft.name, verifier=verifier, dtype=self.dtype
            ).to(device)
        elif draft is not None and draft.kind == "language-model":
            drafter = LanguageModelDraft(load_verifier(draft.name, dtype).to(device))
        elif draft is not None and draft.kind == "prompt-lookup":
            drafter = PromptLookupDraft(MAX_MATCHED, MIN_MATCHED)
        yield _TransformersRunner(verifier, draft, drafter, self.concurrency)


@dataclass(frozen=True)
class _TransformersRunner(Runner):
    verifier: Any
    draft: Draft | None
    drafter: Any
    concurrency: int

    def run(
        self, prompts: Sequence[TokenizedPrompt], decoding: Decoding, done: Done
    ) -> list[RequestRecord]:
        records = []
        for first in range(0, len(prompts), self.concurrency):
            group = prompts[first : first + self.concurrency]
            start = time.perf_counter()
            outputs, accepted = self._generate([p.token_ids for p in group], decoding)
            seconds = (time.perf_counter() - start) / len(group)
            for prompt, output_ids, kept in zip(group, outputs, accepted, strict=True):
                records.append(
                    RequestRecord(
                        category=prompt.category,
                        num_prompt_tokens=len(prompt.token_ids),
                        output_ids=output_ids,
                        accepted=kept,
                        seconds=seconds,
                    )
                )
                done()
        return records

    def _generate(
        self, prompts: list[list[int]], decoding: Decoding
    ) -> tuple[list[list[int]], list[list[int]]]:
        """New tokens of each prompt, and what was kept of each draft."""
        import torch

        from speculators_core.decoding.generation import generate
        from speculators_core.decoding.sequences import until_end
        from speculators_core.format.proposals import GreedyTokenProposalConfig

        verifier, draft = self.verifier, self.draft
        stop = None if decoding.ignore_eos else verifier.generation_config.eos_token_id
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        torch.manual_seed(decoding.seed)
        ids = torch.tensor(padded, device=verifier.device)
        settings: dict[str, Any] = {
            "attention_mask": torch.tensor(mask, device=verifier.device),
            "max_new_tokens": decoding.max_tokens,
            "eos_token_id": stop,
            "pad_token_id": 0,
            "return_dict_in_generate": True,
            "do_sample": decoding.temperature > 0,
        }
        if decoding.temperature > 0:
            settings |= {"temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
        accepted: list[list[int]] = [[] for _ in prompts]
        output: Any
        if draft is None:
            output = verifier.generate(ids, **settings)
        elif draft.kind == "assisted":
            output = verifier.generate(
                ids, prompt_lookup_num_tokens=draft.speculative_tokens, **settings
            )
        else:
            proposal = GreedyTokenProposalConfig(speculative_tokens=draft.speculative_tokens)
            output = generate(self.drafter, verifier, proposal, ids, **settings)
            accepted = [counts.accepted for counts in output.acceptance]
        new = output.sequences[:, longest:].tolist()
        return [until_end(row, stop) for row in new], accepted


def warm_up(runner: Runner, prompts: Sequence[TokenizedPrompt], decoding: Decoding) -> None:
    """Runs one short request that no figure counts."""
    short = Decoding(WARM_UP_TOKENS, decoding.temperature, decoding.seed, ignore_eos=True)
    runner.run(prompts[:1], short, lambda: None)
