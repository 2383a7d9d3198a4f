"""Rate of vLLM's prefill, with and without hidden states."""

import time
from collections.abc import Callable, Sequence

from vllm import SamplingParams

from benchmarks.data_generation.material import make_plan, make_texts
from benchmarks.data_generation.settings import DataBenchmarkConfig
from speculators_core.data_generation.engines.pipeline import InferencePipeline
from speculators_core.data_generation.examples import Example
from speculators_vllm import offline


def with_states(settings: DataBenchmarkConfig) -> float:
    plan = make_plan(settings, engine={"name": "vllm"})
    with InferencePipeline.from_config(plan) as engine:
        return _rate(settings, engine.run)


def without_states(settings: DataBenchmarkConfig) -> float:
    parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    with offline.loaded(
        model=make_plan(settings).data.verifier,
        dtype=settings.dtype,
        max_model_len=settings.length + 1,
        skip_tokenizer_init=True,
        **offline.default_arguments(),
    ) as llm:
        return _rate(
            settings,
            lambda examples: offline.continue_all(
                llm, [example.input_ids.tolist() for example in examples], parameters
            ),
        )


def _rate(
    settings: DataBenchmarkConfig, work: Callable[[Sequence[Example]], Sequence[object]]
) -> float:
    """Tokens a second, after a round that is not timed; no text is run twice."""
    texts = iter(make_texts(settings, 2 * settings.texts))
    work([next(texts) for _ in range(settings.texts)])
    timed = list(texts)
    start = time.perf_counter()
    work(timed)
    return sum(len(text.input_ids) for text in timed) / (time.perf_counter() - start)


RATES = {"with_states": with_states, "without_states": without_states}
