"""Prefill of vLLM with hidden states, and without."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from benchmarks.data_generation.settings import DataBenchmarkConfig
from benchmarks.ratios import Line, alternate, in_process
from speculators_vllm import offline

if TYPE_CHECKING:
    from speculators_core.data_generation.examples import Example


def measure_engine(settings: DataBenchmarkConfig) -> Iterator[Line]:
    """The states are those that an EAGLE-3 draft reads."""
    ours, plain = alternate(
        settings.runs,
        lambda: in_process(_rate_with_states, settings),
        lambda: in_process(_rate_of_vllm, settings),
    )
    yield Line(
        what="vLLM, states of 3 layers and the last",
        unit="tok/s",
        ours=ours,
        beside="the same vLLM without",
        reference=plain,
        target=0.85,
    )


def _rate_with_states(settings: DataBenchmarkConfig) -> float:
    offline.prepare()
    from benchmarks.data_generation.material import make_plan  # after prepare
    from speculators_core.data_generation.engines.pipeline import InferencePipeline  # after prepare

    plan = make_plan(settings, engine={"name": "vllm"})
    with InferencePipeline.from_config(plan) as engine:
        return _rate(settings, engine.forward)


def _rate_of_vllm(settings: DataBenchmarkConfig) -> float:
    offline.prepare()
    from vllm import SamplingParams  # after prepare

    from benchmarks.data_generation.material import make_plan  # after prepare

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
    settings: DataBenchmarkConfig, work: Callable[[Sequence["Example"]], Sequence[object]]
) -> float:
    """Tokens a second, after a round that is not timed; no text is run twice."""
    from benchmarks.data_generation.material import make_texts  # after prepare

    texts = iter(make_texts(settings, 2 * settings.texts))
    work([next(texts) for _ in range(settings.texts)])
    timed = list(texts)
    start = time.perf_counter()
    work(timed)
    return sum(len(text.input_ids) for text in timed) / (time.perf_counter() - start)
