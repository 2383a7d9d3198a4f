"""``speculators acceptance``: measures drafts and their verifier alone."""

from typing import Annotated

from cyclopts import Parameter

from benchmarks.acceptance.settings import AcceptanceConfig
from speculators_vllm import offline


def run(*, config: Annotated[AcceptanceConfig | None, Parameter(name="*")] = None) -> None:
    """Measure acceptance and speed of drafts, compared with their verifier alone."""
    config = config or AcceptanceConfig()
    config.check()
    if config.runs_vllm:
        offline.prepare(config.verbose)
    # Here: it imports torch, which comes after `prepare`, and for which --help need not wait.
    from benchmarks.acceptance.measurement import measure_and_write

    measure_and_write(config)
