"""``speculators train``: trains a speculator."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from speculators_core.console import result_alone_on_stdout
from speculators_core.flags import AsJson, Switch, flags_of
from speculators_core.settings import Settings
from speculators_core.training.ranks import rank
from speculators_core.training.settings import TrainingPlan, read_training_plan

if TYPE_CHECKING:
    PlanFlags = Settings
else:
    PlanFlags = flags_of(TrainingPlan)

STOPPED_EXIT = 143
"""Exit code of a run that a signal stopped, as of a process that SIGTERM ended."""


def run(
    *,
    config: Path | None = None,
    dry_run: Annotated[bool, Switch] = False,
    as_json: AsJson = False,
    flags: Annotated[PlanFlags | None, Parameter(name="*")] = None,
) -> None:
    """Train a speculator. Run the same command again to resume.

    Options come from a YAML file, from flags, or from both.

    Parameters
    ----------
    config
        YAML file with the sections model, data, optimizer, evaluation and run; flags take
        precedence.
    dry_run
        Print parameters, memory, tokens, time and disk space of the run, without training.
    as_json
        Print the report as JSON.
    """
    from speculators_core.training.train import print_report, rehearse, train

    plan = read_training_plan(config, dict(flags or ()))
    if dry_run:
        rehearse(plan)
        return
    with result_alone_on_stdout() if as_json else nullcontext():
        report = train(plan)
    if rank() == 0 and as_json:
        print(report.model_dump_json(indent=2))
    elif rank() == 0:
        print_report(report)
    if report.speculator is None:
        sys.exit(STOPPED_EXIT)
