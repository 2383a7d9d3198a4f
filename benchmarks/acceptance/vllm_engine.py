"""vLLM in this process."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import JsonValue
from vllm import LLM, SamplingParams

from benchmarks.acceptance.engines import (
    MAX_MATCHED,
    MIN_MATCHED,
    Decoding,
    Done,
    Draft,
    Engine,
    Kind,
    Runner,
)
from speculators_core.decoding.prompts import TokenizedPrompt
from speculators_core.diagnosis.acceptance_report import RequestRecord
from speculators_core.format.checkpoint import fetch_config
from speculators_vllm import offline
from speculators_vllm.plugin.speculative_config import vllm_settings


@dataclass(frozen=True)
class VLLMEngine(Engine):
    """vLLM with at most `concurrency` requests at a time."""

    verifier: str
    dtype: str
    concurrency: int
    engine_args: Mapping[str, JsonValue]

    @contextmanager
    def loaded(self, draft: Draft | None) -> Iterator[Runner]:
        arguments: dict[str, JsonValue] = {
            "model": self.verifier,
            "dtype": self.dtype,
            "max_num_seqs": self.concurrency,
            **self.engine_args,
        }
        if draft is not None:
            arguments["speculative_config"] = {
                **_METHODS[draft.kind](draft.name),
                "num_speculative_tokens": draft.speculative_tokens,
            }
        with offline.loaded(**arguments) as llm:
            yield _VLLMRunner(llm, self.concurrency)


def speculator_settings(name: str) -> dict[str, JsonValue]:
    """vLLM's settings of a speculator: its folder, and what vLLM without the plug-in needs."""
    if offline.has_plugin():
        return {"model": name}
    return {"model": name, **vllm_settings(fetch_config(name))}


_METHODS: dict[Kind, Callable[[str], dict[str, JsonValue]]] = {
    "speculator": speculator_settings,
    "language-model": lambda name: {"model": name, "method": "draft_model"},
    "prompt-lookup": lambda _: {
        "method": "ngram",
        "prompt_lookup_min": MIN_MATCHED,
        "prompt_lookup_max": MAX_MATCHED,
    },
}
"""vLLM's settings of each kind of draft, by its name."""


@dataclass(frozen=True)
class _VLLMRunner(Runner):
    llm: LLM
    concurrency: int

    def run(
        self, prompts: Sequence[TokenizedPrompt], decoding: Decoding, done: Done
    ) -> list[RequestRecord]:
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
