"""Progress of a run on terminal and log."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from speculators_core.console import LINE_EVERY_S, console
from speculators_core.data_generation.runs.workers import UnitDone, UnitProgress
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import open_own

Done = TypeVar("Done", contravariant=True)

logger = logging.getLogger(__name__)


class Meter:
    """Totals since the run began."""

    def __init__(self, total_rows: int | None) -> None:
        self.total_rows = total_rows
        self.started = time.monotonic()
        self.rows = 0
        self.num_examples = 0
        self.num_tokens = 0
        self.size_bytes = 0
        self.num_units = 0
        self.num_units_kept = 0
        self.engine_s = 0.0
        self.set_aside: dict[str, str] = {}
        self._under_way: Counter[int] = Counter()
        """Tokens of units that are not stored, by the unit's number."""
        self._rows_at_first: int | None = None

    def add(self, done: UnitDone | UnitProgress) -> None:
        if isinstance(done, UnitProgress):
            self._under_way[done.unit] += done.num_tokens
            return
        del self._under_way[done.unit]
        self.rows = max(self.rows, done.rows)
        self.num_units += 1
        if done.was_there:
            self.num_units_kept += 1
            return
        if self._rows_at_first is None:
            self._rows_at_first = self.rows
        self.num_examples += done.num_examples
        self.num_tokens += done.num_tokens
        self.size_bytes += done.size_bytes
        self.engine_s += done.engine_s
        self.set_aside |= {aside.key: aside.reason for aside in done.set_aside}

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def num_tokens_run(self) -> int:
        """Tokens that were stored, and those of units under way."""
        return self.num_tokens + sum([*self._under_way.values()])  # a copy: threads ask

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens_run / max(self.elapsed_s, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Estimated time left, from the rows left; None while their number is unknown."""
        if self.total_rows is None or self._rows_at_first is None:
            return None
        run = self.rows - self._rows_at_first
        return self.elapsed_s * (self.total_rows - self.rows) / run if run else None

    def line(self) -> str:
        """For example ``1024 examples, 812345 tokens, 41200 tokens/s, 1.3 GB, 12 s left``."""
        aside = f", {len(self.set_aside)} set aside" if self.set_aside else ""
        left = "" if self.left_s is None else f", {self.left_s:.0f} s left"
        return (
            f"{self.num_examples} examples, {self.num_tokens_run} tokens, "
            f"{self.tokens_per_s:.0f} tokens/s, {self.size_bytes / 1e9:.3f} GB{aside}{left}"
        )


class Measure(Protocol[Done]):
    """Totals that `metered` shows."""

    total_rows: int | None
    rows: int

    def add(self, done: Done) -> None: ...
    def line(self) -> str: ...


@contextmanager
def metered(
    meter: Measure[Done], log_file: Path | None, command: str = "generate-data"
) -> Iterator[Callable[[Done], None]]:
    """Yields a function to call for each result; shows and logs the meter's line.

    A terminal gets a progress bar; the log, or other output, one line every half minute.

    Raises:
        SpeculatorError: the log file cannot be written.
    """
    log = _Log(log_file)
    log.write("began")
    columns = (
        _Line(meter),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(command, total=meter.total_rows)

        def show(done: Done) -> None:
            meter.add(done)
            bar.update(task, completed=meter.rows)

        def tick() -> None:
            log.write(meter.line())
            if not console.is_terminal:
                console.print(meter.line())

        try:
            with _every(LINE_EVERY_S, tick):
                yield show
        except BaseException as error:
            log.write(f"stopped: {first_line(error)}; {meter.line()}")
            raise
    log.write(f"ended: {meter.line()}")


@contextmanager
def _every(seconds: float, tick: Callable[[], None]) -> Iterator[None]:
    """Calls ``tick`` from a thread at this interval."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            try:
                tick()
            except SpeculatorError as error:
                logger.warning("%s", error)

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Line(ProgressColumn):
    """What the meter says whenever the bar is drawn, also between two calls of ``show``."""

    def __init__(self, meter: Measure[Done]) -> None:
        super().__init__()
        self._meter = meter

    def render(self, task: Task) -> Text:
        return Text(self._meter.line())


class _Log:
    def __init__(self, path: Path | None) -> None:
        self.path = path

    def write(self, line: str) -> None:
        if self.path is None:
            return
        try:
            with open_own(self.path) as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        except OSError as error:
            raise SpeculatorError(
                f"log file {self.path} cannot be written: {first_line(error)}; expected a regular "
                "file in a writable folder. Name another one with --run.log-file."
            ) from error
