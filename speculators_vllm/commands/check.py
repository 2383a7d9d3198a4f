"""``speculators check``: checks that a speculator serves."""

import sys
from contextlib import nullcontext
from typing import Annotated

from cyclopts import Parameter

from speculators_core.console import result_alone_on_stdout
from speculators_vllm import offline
from speculators_vllm.verdicts.settings import CheckConfig

NOT_FIT_EXIT = 1


def run(
    speculator: str,
    /,
    *,
    config: Annotated[CheckConfig | None, Parameter(name="*")] = None,
) -> None:
    """Check that a speculator serves as it was trained, or name what is wrong.

    Exit code 0: fit to serve. 1: not fit, with the cause. 2: it could not be checked.

    Parameters
    ----------
    speculator
        Folder or hub id.
    """
    config = config or CheckConfig()
    with result_alone_on_stdout() if config.as_json else nullcontext():
        offline.prepare(config.verbose)
        with offline.quiet():
            from speculators_vllm.verdicts.check import check, print_report

        report = check(speculator, config)
    if config.as_json:
        print(report.model_dump_json(indent=2))
    else:
        print_report(report)
    if not report.is_fit:
        sys.exit(NOT_FIT_EXIT)
