"""What runs the prompts: vLLM, or the reference decoder on Transformers."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.prompts import TokenizedPrompt
from benchmarks.statistics import RequestRecord

logger = logging.getLogger(__name__)

Done = Callable[[], None]
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Decoding:
    """How each prompt is continued."""

    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool


class Runner(Protocol):
    """A loaded verifier, with a speculator or without."""

    def run(
        self, prompts: Sequence[TokenizedPrompt], decoding: Decoding, done: Done
    ) -> list[RequestRecord]: ...


class Engine(Protocol):
    """Loads a verifier; ``speculative_tokens`` None means without a speculator."""

    def loaded(self, speculative_tokens: int | None) -> Any: ...


@dataclass(frozen=True)
class VLLMEngine:
    """vLLM in this process, `concurrency` requests at a time."""

    verifier: str
    speculator: str
    dtype: str
    concurrency: int
    engine_args: dict[str, Any]

    @contextmanager
    def loaded(self, speculative_tokens: int | None) -> Iterator[Runner]:
        from vllm import LLM

        arguments: dict[str, Any] = {
            "model": self.verifier,
            "dtype": self.dtype,
            "max_num_seqs": self.concurrency,
            **self.engine_args,
        }
        if speculative_tokens is not None:
            arguments["per_request_spec_decode_metrics"] = "detailed"
            arguments["speculative_config"] = {
                "model": self.speculator,
                "num_speculative_tokens": speculative_tokens,
            }
        llm = LLM(**arguments)
        try:
            yield _VLLMRunner(llm, self.concurrency)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


@dataclass(frozen=True)
class _VLLMRunner:
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
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt.token_ids} for prompt in group],
                parameters,
                use_tqdm=False,
            )
            # Requests of a group share its time: their rates add up to the group's.
            seconds = (time.perf_counter() - start) / len(group)
            for prompt, output in zip(group, outputs, strict=True):
                (completion,) = output.outputs
                metrics = completion.spec_decode_metrics
                records.append(
                    RequestRecord(
                        category=prompt.category,
                        num_prompt_tokens=len(prompt.token_ids),
                        output_ids=list(completion.token_ids),
                        accepted=list(metrics.per_step_accepted) if metrics else [],
                        seconds=seconds,
                    )
                )
                done()
        return records


@dataclass(frozen=True)
class TransformersEngine:
    """The reference decoder; without a speculator the verifier's own `generate`."""

    verifier: str
    speculator: str
    dtype: str

    @contextmanager
    def loaded(self, speculative_tokens: int | None) -> Iterator[Runner]:
        import torch

        from speculators_core.model import SpeculatorModel

        speculator = SpeculatorModel.from_pretrained(
            self.speculator, verifier=self.verifier, dtype=self.dtype
        )
        if torch.cuda.is_available():
            speculator.to("cuda")
            speculator.verifier.to("cuda")
        yield _TransformersRunner(speculator, speculative_tokens)


@dataclass(frozen=True)
class _TransformersRunner:
    speculator: Any
    speculative_tokens: int | None

    def run(
        self, prompts: Sequence[TokenizedPrompt], decoding: Decoding, done: Done
    ) -> list[RequestRecord]:
        import torch

        verifier = self.speculator.verifier
        stop_ids = None if decoding.ignore_eos else verifier.generation_config.eos_token_id
        common = {"max_new_tokens": decoding.max_tokens, "eos_token_id": stop_ids}
        records = []
        for prompt in prompts:
            ids = torch.tensor([prompt.token_ids], device=verifier.device)
            accepted: list[int] = []
            start = time.perf_counter()
            if self.speculative_tokens is None:
                sequences = verifier.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, **common
                )
            else:
                output = self.speculator.generate(
                    ids,
                    do_sample=False,
                    num_assistant_tokens=self.speculative_tokens,
                    return_dict_in_generate=True,
                    **common,
                )
                sequences, accepted = output.sequences, output.acceptance[0].accepted
            records.append(
                RequestRecord(
                    category=prompt.category,
                    num_prompt_tokens=len(prompt.token_ids),
                    output_ids=sequences[0, len(prompt.token_ids) :].tolist(),
                    accepted=accepted,
                    seconds=time.perf_counter() - start,
                )
            )
            done()
        return records


def warm_up(runner: Runner, prompts: Sequence[TokenizedPrompt], decoding: Decoding) -> None:
    """Runs one short request that no figure counts."""
    short = Decoding(WARM_UP_TOKENS, decoding.temperature, decoding.seed, ignore_eos=True)
    runner.run(prompts[:1], short, lambda: None)
