"""``speculators regenerate``: replaces answers by the verifier's."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from speculators_core.data_generation.answers.settings import RegenerateConfig
from speculators_core.data_generation.settings import DatasetConfig
from speculators_core.flags import group, optional
from speculators_core.settings import Settings

if TYPE_CHECKING:
    DatasetFlags = Settings
else:
    DatasetFlags = optional(DatasetConfig, leave_out=("path",))


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

    Parameters
    ----------
    path
        Data set of conversations or prompts: hub id, folder written or read by `datasets`, or file
        (JSONL, JSON, Parquet, Arrow, CSV or text).
    """
    from speculators_core.data_generation.answers.regenerate import print_report, regenerate

    options = {} if dataset is None else dataset.stated()
    report = regenerate(DatasetConfig.read({"path": path, **options}, path), config)
    print_report(report, config.output)
