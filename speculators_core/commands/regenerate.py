"""``speculators regenerate``: replaces answers by the verifier's."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from speculators_core.console import sigterm_as_interrupt
from speculators_core.data_generation.answers.answer_file import check_free
from speculators_core.data_generation.answers.settings import RegenerateConfig
from speculators_core.data_generation.settings import DatasetConfig
from speculators_core.files import in_full
from speculators_core.flags import group, optional
from speculators_core.settings import Settings

if TYPE_CHECKING:
    DatasetFlags = Settings
else:
    DatasetFlags = optional(DatasetConfig, leave_out=("path",))

NOTHING_EXIT = 1
"""No conversation was kept."""


def run(
    path: str,
    /,
    *,
    config: Annotated[RegenerateConfig, Parameter(name="*")],
    dataset: Annotated[
        DatasetFlags | None, Parameter(name="*", group=group("Data set", DatasetConfig))
    ] = None,
) -> None:
    """Replace each turn of the assistant by the verifier's answer, turn after turn.

    Exit code 1: every conversation was set aside.

    Parameters
    ----------
    path
        Data set of conversations or prompts: hub id, folder written or read by `datasets`, or file
        (JSONL, JSON, Parquet, Arrow, CSV or text).
    """
    options = {} if dataset is None else dataset.stated()
    data = DatasetConfig.read({"path": path, **options}, path)
    data.local_path()  # a missing one is refused before anything heavy is loaded
    check_free(in_full(config.output), config.resume)
    from speculators_core.data_generation.answers.regenerate import print_report, regenerate

    with sigterm_as_interrupt():
        report = regenerate(data, config)
    print_report(report, config.output)
    if not report.num_in_output:
        raise SystemExit(NOTHING_EXIT)
