"""Rates and reference rates, measured in turns."""

import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

from pydantic import BaseModel
from rich.table import Table

from speculators_core.console import console

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Line(BaseModel):
    """One ratio."""

    what: str
    unit: str
    ours: float
    beside: str
    """What the reference rate belongs to."""
    reference: float
    target: float | None
    """Smallest ratio that is good enough; None where any is."""
    digits: str = ".0f"
    """Format of both rates."""

    @property
    def ratio(self) -> float:
        return self.ours / self.reference


def print_lines(title: str, lines: Iterable[Line]) -> None:
    """Prints each ratio as soon as it is measured, and a table of all of them."""
    table = Table(title=title, title_justify="left")
    for column in ("what", "ours", "beside", "reference", "ratio", "target"):
        table.add_column(column, no_wrap=True)
    for line in lines:
        console.print(f"{line.what}: {line.ratio:.2f} of {line.beside}", markup=False)
        table.add_row(
            line.what,
            f"{line.ours:{line.digits}} {line.unit}".rstrip(),
            line.beside,
            f"{line.reference:{line.digits}} {line.unit}".rstrip(),
            f"{line.ratio:.2f}",
            "-" if line.target is None else f"{line.target:.2f}",
        )
    console.print(table)


def in_process(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """The function's result, computed in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def alternate(runs: int, *measures: Callable[[], float]) -> list[float]:
    """The median of each measurement, all taken in turns."""
    taken = [[measure() for measure in measures] for _ in range(runs)]
    return [statistics.median(values) for values in zip(*taken, strict=True)]
