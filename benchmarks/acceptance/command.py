"""``speculators acceptance``: measures drafts beside their verifier alone."""

from typing import Annotated

from cyclopts import Parameter

from benchmarks.acceptance.settings import AcceptanceConfig


def run(*, config: Annotated[AcceptanceConfig | None, Parameter(name="*")] = None) -> None:
    """Measure acceptance and speed of drafts beside their verifier alone."""
    # What is heavy comes when a command runs, as in speculators_core.commands.
    from benchmarks.acceptance.measurement import measure_and_write

    measure_and_write(config or AcceptanceConfig())
