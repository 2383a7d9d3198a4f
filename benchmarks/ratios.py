"""Rates beside rates: taken in turns, in processes of their own, printed with their targets."""

import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from speculators_core.console import console


class Line(BaseModel):
    """One ratio."""

    what: str
    unit: str
    ours: float
    beside: str
    """What the other rate is of."""
    reference: float
    target: float | None
    """The least that the ratio should be."""
    digits: str = ".0f"
    """How the two are written."""

    @property
    def ratio(self) -> float:
        return self.ours / self.reference


def print_lines(title: str, lines: Iterable[Line]) -> None:
    """Each ratio when it has been taken, and a table of all."""
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


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives, called in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def alternate(runs: int, *measures: Callable[[], float]) -> list[float]:
    """The median of each measurement, all taken in turns."""
    taken = [[measure() for measure in measures] for _ in range(runs)]
    return [statistics.median(values) for values in zip(*taken, strict=True)]
