"""``speculators build``: a speculator from verifier and prompts."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from speculators_core.building.settings import BuildPlan, read_build_plan
from speculators_core.commands.train import STOPPED_EXIT
from speculators_core.console import result_alone_on_stdout
from speculators_core.flags import AsJson, Switch, flags_of
from speculators_core.settings import Settings

if TYPE_CHECKING:
    PlanFlags = Settings
else:
    PlanFlags = flags_of(BuildPlan)


def run(
    *,
    config: Path | None = None,
    dry_run: Annotated[bool, Switch] = False,
    as_json: AsJson = False,
    flags: Annotated[PlanFlags | None, Parameter(name="*")] = None,
) -> None:
    """Build a speculator from a verifier and prompts. Run the same command again to resume.

    Stages: prompts, the verifier's answers, its hidden states, and training with check, acceptance
    and card. A stage that is done, with the same plan and input, is skipped.

    Parameters
    ----------
    config
        YAML file with the sections model, prompts, answers, engine, optimizer, evaluation and run;
        flags take precedence.
    dry_run
        Print tokens, time, disk space and memory of each stage, measured on a few prompts.
    as_json
        Print the report as JSON.
    """
    plan = read_build_plan(config, dict(flags or ()))
    for dataset in plan.prompts.datasets:
        dataset.local_path()  # a missing one is refused before anything heavy is loaded
    from speculators_core.building.build import build, print_report
    from speculators_core.building.rehearsal import rehearse

    if dry_run:
        rehearse(plan)
        return
    with result_alone_on_stdout() if as_json else nullcontext():
        report = build(plan)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print_report(report)
    if report.speculator is None:
        sys.exit(STOPPED_EXIT)
