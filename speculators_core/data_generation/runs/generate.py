"""Run of data generation, to a store or queue."""

import atexit
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

from pydantic import Field
from rich.table import Table
from tqdm import tqdm

from speculators_core.console import console
from speculators_core.data_generation.documented import as_plan
from speculators_core.data_generation.reasons import count_reasons, describe_reasons
from speculators_core.data_generation.runs.preparation import placed, prepare
from speculators_core.data_generation.runs.progress import Meter, metered
from speculators_core.data_generation.runs.ray_workers import run_on_ray
from speculators_core.data_generation.runs.workers import (
    Told,
    WorkerDone,
    end_of,
    run_here,
    to_json,
    watch_parent,
)
from speculators_core.data_generation.settings import DataGenConfig, GenerationPlan
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.data_generation.texts.sources import count_rows
from speculators_core.errors import SpeculatorError
from speculators_core.files import locked
from speculators_core.provenance import versions
from speculators_core.registry import ENGINES
from speculators_core.settings import Settings

LOG = "generate.log"
FAULT = b"fault:"


class StoreTotals(Settings):
    """Totals of a store, over all runs."""

    num_examples: int
    num_tokens: int
    size_bytes: int


class RunReport(Settings):
    """Totals of a run, without those of an earlier one, and what was set aside."""

    num_examples: int = 0
    num_tokens: int = 0
    size_bytes: int = 0
    num_units: int = 0
    num_units_kept: int = 0
    """Units that an earlier run had stored."""
    seconds: float = 0.0
    engine_s: float = 0.0
    """Sum over the engines of all workers."""
    set_aside: dict[str, str] = Field(default_factory=dict)
    """Examples on which the engine failed, and why; for a store, those of earlier runs too."""
    counts: dict[str, int | dict[str, int]] = Field(default_factory=dict)
    """Rows that were read, skipped and cut."""
    store: StoreTotals | None = None
    """None if the examples went to a queue."""
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether neither this run nor an earlier one made an example."""
        earlier = self.num_units_kept if self.store is None else self.store.num_examples
        return not (self.num_examples or earlier)


def generate_data(plan: GenerationPlan | DataGenConfig, **options: object) -> RunReport:
    """Generates what the plan asks for.

    ``options``, beside a `DataGenConfig` alone: sections (``engine``, ``sync``, ``run``) and single
    options of them, such as ``path`` and ``batch_size``.

    Nothing heavy starts before the plan, the data and the store have been checked. What was stored
    before an error is kept, and the same plan with ``run.resume`` resumes from there.

    Files that data name are read below the current directory and the store, if the plan names no
    ``run.allowed_roots``; what the plan itself names may lie anywhere.

    Raises:
        SpeculatorError: plan, data, engine or store are at fault, or more examples failed than
            ``run.max_failures``.
    """
    plan = placed(as_plan(plan, options))
    ENGINES.load(plan.engine.name)
    meter = Meter(count_rows(plan))
    with locked(plan.sync.path):
        store = prepare(plan)
        if store is not None:
            meter.set_aside = store.set_aside()
        counts: dict[str, int | dict[str, int]] = {}
        try:
            with metered(meter, _log_file(plan)) as show:
                for told in _workers(plan):
                    if isinstance(told, WorkerDone):
                        counts = told.counts
                        continue
                    show(told)
                    _check_failures(meter.set_aside, plan)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(_stopped(plan, meter)) from stop
        report = RunReport(
            num_examples=meter.num_examples,
            num_tokens=meter.num_tokens,
            size_bytes=meter.size_bytes,
            num_units=meter.num_units,
            num_units_kept=meter.num_units_kept,
            seconds=meter.elapsed_s,
            engine_s=meter.engine_s,
            set_aside=meter.set_aside,
            counts=counts,
            versions=versions(),
        )
        if store is not None:
            store.check_numbers(below=meter.num_units)
            store.close()
            report = report.model_copy(update={"store": _totals(store)})
            store.complete(report.model_dump_json(indent=2))
    return report


def _workers(plan: GenerationPlan) -> Iterator[Told]:
    return run_on_ray(plan) if plan.run.backend == "ray" else run_here(plan)


def _stopped(plan: GenerationPlan, meter: Meter) -> str:
    """What a user who stopped the run should know."""
    where, resume = plan.sync.path, "Run the same command with --run.resume to continue."
    if where is None:
        resume = "sync.path is not set, so the next run starts from the beginning."
    done = f"stored in {where}" if plan.sync.kind == "disk" else "sent"
    return f"stopped: {meter.num_examples} examples of this run were {done}. {resume}"


def _totals(store: DiskStore) -> StoreTotals:
    return StoreTotals(
        num_examples=len(store),
        num_tokens=int(store.lengths.sum()),
        size_bytes=store.size_bytes,
    )


def _log_file(plan: GenerationPlan) -> Path | None:
    return plan.run.log_file or (plan.sync.path and plan.sync.path / LOG)


def _check_failures(set_aside: dict[str, str], plan: GenerationPlan) -> None:
    if len(set_aside) > plan.run.max_failures:
        key, reason = list(set_aside.items())[-1]
        raise SpeculatorError(
            f"{len(set_aside)} examples failed, more than run.max_failures "
            f"({plan.run.max_failures}); the last, {key}: {reason}. Correct their cause and pass "
            "--run.repair, or raise run.max_failures."
        )


# ---- a process of its own ----


class GenerationProcess:
    """A run in another process, which ends with this one at the latest.

    As a context manager it is stopped at the end.
    """

    def __init__(self, plan: GenerationPlan) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_generate, args=(theirs, to_json(plan)))
        self._process.start()
        theirs.close()
        self._message: bytes | None = None
        atexit.register(self.stop)  # or Python would wait for it, and it for us to take examples

    def report(self) -> RunReport:
        """Waits for the end of the run and returns its report.

        Raises:
            SpeculatorError: the run met one, or was killed.
        """
        if self._message is None:
            try:
                self._message = self._ours.recv_bytes()
            except EOFError as error:
                self._process.join()
                end = end_of(self._process.exitcode or 0)
                raise SpeculatorError(
                    f"The process of data generation {end}. What it stored is kept; set run.resume "
                    "to resume."
                ) from error
            self._process.join()
        if self._message.startswith(FAULT):
            raise SpeculatorError(self._message.removeprefix(FAULT).decode())
        return RunReport.model_validate_json(self._message)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def stop(self) -> None:
        """Ends the run if it has not ended; what it stored is kept."""
        self._process.terminate()
        self._process.join()
        atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def generate_data_process(
    plan: GenerationPlan | DataGenConfig, **options: object
) -> GenerationProcess:
    """Starts `generate_data` in another process."""
    return GenerationProcess(as_plan(plan, options))


def _generate(connection: Connection, plan: str) -> None:
    # The default lock is a semaphore, and Python warns of a process that is ended holding one.
    tqdm.set_lock(threading.RLock())
    os.setsid()  # a signal to the parent's group is for the parent, which then stops this run
    watch_parent()
    try:
        report = generate_data(GenerationPlan.model_validate_json(plan))
        connection.send_bytes(report.model_dump_json().encode())
    except SpeculatorError as error:
        connection.send_bytes(FAULT + str(error).encode())


def print_report(report: RunReport, plan: GenerationPlan) -> None:
    table = Table(title="generate-data", show_header=False)
    table.add_column("what")
    table.add_column("number", justify="right")
    rate = report.num_tokens / report.seconds if report.seconds else 0.0
    lines: dict[str, object] = {
        "examples": report.num_examples,
        "tokens": report.num_tokens,
        "bytes": report.size_bytes,
        "seconds": f"{report.seconds:.1f}",
        "tokens/s": f"{rate:.0f}",
        "units": report.num_units,
        "units of an earlier run": report.num_units_kept,
        "examples set aside": len(report.set_aside),
    }
    if report.store is not None:
        lines |= {
            "examples in the store": report.store.num_examples,
            "tokens in the store": report.store.num_tokens,
            "bytes in the store": report.store.size_bytes,
        }
    for name, value in lines.items():
        table.add_row(name, str(value))
    for name, value in _flat_counts(report.counts):
        table.add_row(name, str(value))
    console.print(table)
    where = f"to {', '.join(plan.sync.urls)}" if report.store is None else f"to {plan.sync.path}"
    if report.num_examples:
        verb = "sent" if report.store is None else "wrote"
        console.print(f"{verb} {report.num_examples} examples {where}", markup=False)
    elif not report.is_empty:
        console.print(f"nothing was added {where}: an earlier run was complete", markup=False)
    else:
        console.print(f"nothing was written {where}", markup=False)
    if missing := left_out(report):
        console.print(f"left out: {describe_reasons(missing)}", markup=False)


def left_out(report: RunReport) -> dict[str, int]:
    """Rows without an example, by reason, the most frequent first.

    Those that were skipped as they were read, those of earlier runs too, and those that the engine
    set aside.
    """
    skipped = report.counts.get("skipped", {})
    assert isinstance(skipped, dict)
    return count_reasons(Counter(report.set_aside.values()) + Counter(skipped))


def _flat_counts(counts: dict[str, int | dict[str, int]]) -> Iterator[tuple[str, int]]:
    for name, value in counts.items():
        if isinstance(value, dict):
            yield from ((f"{name}: {reason}", number) for reason, number in value.items())
        else:
            yield name.replace("_", " "), value
