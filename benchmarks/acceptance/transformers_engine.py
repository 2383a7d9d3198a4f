"""The reference decoder on Transformers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.acceptance.engines import (
    MAX_MATCHED,
    MIN_MATCHED,
    Decoding,
    Done,
    Draft,
    Engine,
    Runner,
)
from speculators_core.decoding.drafter import Drafter
from speculators_core.decoding.generation import (
    SpeculativeOutput,
    generate,
    neutral_generation,
)
from speculators_core.decoding.independent import LanguageModelDraft, PromptLookupDraft
from speculators_core.decoding.prompts import TokenizedPrompt
from speculators_core.decoding.sequences import until_end
from speculators_core.diagnosis.acceptance_report import RequestRecord
from speculators_core.format.checkpoint import as_dtype
from speculators_core.format.proposals import GreedyTokenProposalConfig
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.verifier.reading import load_verifier


@dataclass(frozen=True)
class TransformersEngine(Engine):
    """The reference decoder; without a draft the verifier's `generate`."""

    verifier: str
    dtype: str
    concurrency: int

    @contextmanager
    def loaded(self, draft: Draft | None) -> Iterator[Runner]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = None if self.dtype == "auto" else as_dtype(self.dtype)
        verifier = load_verifier(self.verifier, dtype).to(device)
        drafter: Drafter | None = None
        if draft is not None and draft.kind == "speculator":
            drafter = SpeculatorModel.from_pretrained(
                draft.name, verifier=verifier, dtype=self.dtype
            ).to(device)
        elif draft is not None and draft.kind == "language-model":
            drafter = LanguageModelDraft(load_verifier(draft.name, dtype).to(device))
        elif draft is not None and draft.kind == "prompt-lookup":
            drafter = PromptLookupDraft(MAX_MATCHED, MIN_MATCHED)
        yield TransformersRunner(verifier, draft, drafter, self.concurrency)


@dataclass(frozen=True)
class TransformersRunner(Runner):
    """A verifier in memory; ``drafter`` is None where Transformers decodes alone."""

    verifier: PreTrainedModel
    draft: Draft | None
    drafter: Drafter | None
    concurrency: int

    def run(
        self, prompts: Sequence[TokenizedPrompt], decoding: Decoding, done: Done
    ) -> list[RequestRecord]:
        records = []
        for first in range(0, len(prompts), self.concurrency):
            group = prompts[first : first + self.concurrency]
            start = time.perf_counter()
            with neutral_generation(self.verifier):
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
        """New tokens of each prompt, and tokens kept of each of its drafts."""
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
        if draft is not None and self.drafter is not None:
            proposal = GreedyTokenProposalConfig(speculative_tokens=draft.speculative_tokens)
            output = generate(self.drafter, verifier, proposal, ids, **settings)
            assert isinstance(output, SpeculativeOutput) and output.acceptance is not None
            accepted = [counts.accepted for counts in output.acceptance]
        else:
            if draft is not None:
                settings["prompt_lookup_num_tokens"] = draft.speculative_tokens
            output = verifier.generate(ids, **settings)
        new = output.sequences[:, longest:].tolist()
        return [until_end(row, stop) for row in new], accepted
