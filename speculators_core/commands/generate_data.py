"""``speculators generate-data``: stores a verifier's hidden states of texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from speculators_core.console import result_alone_on_stdout, sigterm_as_interrupt
from speculators_core.data_generation.settings import GenerationPlan, read_plan
from speculators_core.flags import AsJson, flags_of
from speculators_core.settings import Settings

if TYPE_CHECKING:
    PlanFlags = Settings
else:
    PlanFlags = flags_of(GenerationPlan)

NOTHING_EXIT = 1
"""No example was made."""


def run(
    *,
    config: Path | None = None,
    as_json: AsJson = False,
    flags: Annotated[PlanFlags | None, Parameter(name="*")] = None,
) -> None:
    """Run texts through a verifier and store its hidden states, on disk or through a queue.

    Options come from a YAML file, from flags, or from both.

    Exit code 1: every row was skipped or set aside.

    Parameters
    ----------
    config
        YAML file with the sections data, engine, sync and run; flags take precedence.
    as_json
        Print the report as JSON.
    """
    plan = read_plan(config, dict(flags or ()))
    for dataset in plan.data.datasets:
        dataset.local_path()  # a missing one is refused before anything heavy is loaded
    from speculators_core.data_generation.runs.generate import generate_data, placed, print_report

    plan = placed(plan, *(() if config is None else (config.resolve().parent,)))
    with sigterm_as_interrupt():
        if as_json:
            with result_alone_on_stdout():
                report = generate_data(plan)
            print(report.model_dump_json(indent=2))
        else:
            report = generate_data(plan)
            print_report(report, plan)
    if report.is_empty:
        raise SystemExit(NOTHING_EXIT)
