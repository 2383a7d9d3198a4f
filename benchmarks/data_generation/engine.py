"""Prefill of vLLM with hidden states, and without."""

from collections.abc import Iterator

from benchmarks.data_generation.settings import DataBenchmarkConfig
from benchmarks.ratios import Line, alternate, in_process
from speculators_vllm import offline


def measure_engine(settings: DataBenchmarkConfig) -> Iterator[Line]:
    """The states are those that an EAGLE-3 draft reads."""
    ours, plain = alternate(
        settings.runs,
        lambda: in_process(_rate, "with_states", settings),
        lambda: in_process(_rate, "without_states", settings),
    )
    yield Line(
        what="vLLM, states of 3 layers and the last",
        unit="tok/s",
        ours=ours,
        beside="the same vLLM without",
        reference=plain,
        target=0.85,
    )


def _rate(name: str, settings: DataBenchmarkConfig) -> float:
    offline.prepare()
    from benchmarks.data_generation import engine_rates  # imports torch, after `prepare`

    return engine_rates.RATES[name](settings)
