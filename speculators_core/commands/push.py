"""``speculators push``: sends a speculator to the hub."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from speculators_core.console import result_alone_on_stdout
from speculators_core.publishing.settings import PushConfig


def run(
    folder: Path,
    repo: str,
    /,
    *,
    config: Annotated[PushConfig | None, Parameter(name="*")] = None,
) -> None:
    """Check a speculator and its model card, then send them to the hub in one commit.

    Parameters
    ----------
    folder
        Folder of the speculator.
    repo
        Hub id of the repository: owner/name.
    """
    from speculators_core.publishing.push import print_report, push

    config = config or PushConfig()
    if config.as_json:
        with result_alone_on_stdout():
            report = push(folder, repo, config)
        print(report.model_dump_json(indent=2))
    else:
        print_report(push(folder, repo, config), config.dry_run)
