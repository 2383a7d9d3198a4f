"""``speculators generate-data``: texts through a verifier, to a store or a queue."""

import fcntl
import multiprocessing
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import Parameter
from pydantic import Field
from rich.table import Table

from speculators_core.console import console, result_alone_on_stdout
from speculators_core.data_generation.settings import (
    EngineConfig,
    GenerationPlan,
    RunConfig,
    SyncConfig,
    read_plan,
)
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.settings import Settings

CONFIG = "config.yaml"
COMMAND = "command.txt"
LOG = "generate.log"
LOCK = ".lock"


class RunReport(Settings):
    """What a run made, and what it left out."""

    num_examples: int = 0
    num_tokens: int = 0
    size_bytes: int = 0
    num_units: int = 0
    num_units_kept: int = 0
    """Units that an earlier run had made."""
    seconds: float = 0.0
    engine_s: float = 0.0
    """Of all workers' engines together."""
    set_aside: dict[str, str] = Field(default_factory=dict)
    """Examples on which the engine failed, and why; of an earlier run too."""
    counts: dict[str, Any] = Field(default_factory=dict)
    """Rows that were read, and what became of them."""
    versions: dict[str, str] = Field(default_factory=dict)


def run(
    *,
    config: Path,
    engine: Annotated[EngineConfig | None, Parameter(name="engine")] = None,
    sync: Annotated[SyncConfig | None, Parameter(name="sync")] = None,
    run: Annotated[RunConfig | None, Parameter(name="run")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Runs texts through a verifier and keeps its hidden states, on disk or through a queue.

    Parameters
    ----------
    config
        YAML file with the sections data, engine, sync and run; flags win over it.
    as_json
        Print the report as JSON.
    """
    plan = read_plan(config, {"engine": engine, "sync": sync, "run": run})
    plan = _with_roots(plan, config.resolve().parent)
    if as_json:
        with result_alone_on_stdout():
            report = generate_data(plan)
        print(report.model_dump_json(indent=2))
    else:
        print_report(generate_data(plan), plan)


def _with_roots(plan: GenerationPlan, *more: Path) -> GenerationPlan:
    """The plan with the folders that it may read and write, if it names none."""
    if plan.run.allowed_roots:
        return plan
    folders = [Path.cwd(), *more]
    if plan.sync.path is not None:
        folders.append(plan.sync.path.expanduser().absolute())
    roots = dict.fromkeys(folder.resolve() for folder in folders)
    run = plan.run.model_copy(update={"allowed_roots": tuple(roots)})
    return plan.model_copy(update={"run": run})


def generate_data(plan: GenerationPlan) -> RunReport:
    """Makes what the plan asks for, with as many workers as it says.

    Nothing heavy starts before the plan, the data and the store have been looked at. What was made
    before an error is kept, and the same plan with ``run.resume`` goes on from there.

    Local data are read and written below the current directory and the store, if the plan names no
    ``run.allowed_roots``.

    Raises:
        SpeculatorError: plan, data, engine or store are at fault, or more examples failed than
            ``run.max_failures``.
    """
    from speculators_core.data_generation.engines import schema_of
    from speculators_core.data_generation.paths import Roots
    from speculators_core.data_generation.progress import Meter, metered
    from speculators_core.data_generation.texts.sources import count_rows
    from speculators_core.data_generation.workers import WorkerDone, run_here
    from speculators_core.provenance import versions
    from speculators_core.registry import ENGINES

    plan = _with_roots(plan)
    roots = Roots(plan.run.allowed_roots)
    ENGINES.load(plan.engine.engine)
    schema = schema_of(plan)
    meter = Meter(count_rows(plan))
    folder = None if plan.sync.path is None else roots.check(plan.sync.path)
    with _locked(folder):
        store = _prepared(plan, schema, versions()) if plan.sync.kind == "disk" else None
        if folder is not None:
            _write_provenance(folder, plan)
        counts: dict[str, Any] = {}
        log_file = _log_file(plan, roots)
        with metered(meter, log_file) as show:
            for told in _workers(plan, run_here):
                if isinstance(told, WorkerDone):
                    counts = told.counts
                    continue
                show(told)
                _check_failures(meter.set_aside, plan)
        report = RunReport(
            num_examples=meter.num_examples,
            num_tokens=meter.num_tokens,
            size_bytes=meter.size_bytes,
            num_units=meter.num_units,
            num_units_kept=meter.num_units_kept,
            seconds=meter.elapsed_s,
            engine_s=meter.engine_s,
            set_aside=meter.set_aside if store is None else store.set_aside(),
            counts=counts,
            versions=versions(),
        )
        if store is not None:
            store.close()
            store.complete(report.model_dump_json(indent=2))
    return report


def _workers(plan: GenerationPlan, run_here: Any) -> Iterator[Any]:
    if plan.run.backend == "ray":
        from speculators_core.data_generation.ray_workers import run_on_ray

        return run_on_ray(plan)
    return run_here(plan)


def _log_file(plan: GenerationPlan, roots: Any) -> Path | None:
    if plan.run.log_file is not None:
        return roots.check(plan.run.log_file)
    return None if plan.sync.path is None else plan.sync.path / LOG


def _check_failures(set_aside: dict[str, str], plan: GenerationPlan) -> None:
    if len(set_aside) > plan.run.max_failures:
        key, reason = list(set_aside.items())[-1]
        raise SpeculatorError(
            f"{len(set_aside)} examples failed, more than run.max_failures "
            f"({plan.run.max_failures}); the last, {key}: {reason}."
        )


# ---- the folder ----


def _prepared(plan: GenerationPlan, schema: Any, versions: dict[str, str]) -> Any:
    """The store, made or gone on with; with ``run.repair`` without its damaged shards."""
    from speculators_core.data_generation.stores.disk import DiskStore

    assert plan.sync.path is not None
    store = DiskStore.create(
        plan.sync.path,
        schema,
        made_from=decides_bytes(plan),
        versions=versions,
        resume=plan.run.resume or plan.run.repair,
        compression=plan.sync.compression,
        shard_tokens=plan.sync.shard_tokens,
    )
    store.clean()
    if plan.run.repair:
        for path, what in store.find_damage().items():
            console.print(f"makes {path.name} again: {what}")
            path.unlink()
    store.headers()
    return store


def decides_bytes(plan: GenerationPlan) -> dict[str, Any]:
    """The options that decide what is in each shard."""
    content = plan.model_dump(mode="json")
    engine = {
        key: value
        for key, value in content["engine"].items()
        if key not in ("device", "base_url", "api_key")
    }
    return {
        "data": content["data"],
        "engine": engine,
        "sync": {key: content["sync"][key] for key in ("shard_tokens", "dtype", "compression")},
        "run": {key: content["run"][key] for key in ("limit", "seed")},
    }


@contextmanager
def _locked(folder: Path | None) -> Iterator[None]:
    """One run at a time in a folder; the lock goes with the process.

    Raises:
        SpeculatorError: another run has it.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise SpeculatorError(f"{folder} cannot be made: {first_line(error)}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SpeculatorError(f"{folder}: another run is writing there.") from error
        yield


def _write_provenance(folder: Path, plan: GenerationPlan) -> None:
    """What reruns this run."""
    from speculators_core.data_generation.stores.disk import write_text

    text = yaml.safe_dump(plan.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    write_text(folder / CONFIG, text)
    write_text(folder / COMMAND, f"{shlex.join(sys.argv)}\n")


# ---- a process of its own ----


class GenerationProcess:
    """A run in a process of its own, beside the one that trains."""

    def __init__(self, plan: GenerationPlan) -> None:
        from speculators_core.data_generation.workers import to_json

        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_generate, args=(theirs, to_json(plan)))
        self._process.start()
        theirs.close()

    def report(self) -> RunReport:
        """What the run made, when it has ended.

        Raises:
            SpeculatorError: the run met one, or was killed.
        """
        from speculators_core.data_generation.workers import end_of

        try:
            message = self._ours.recv_bytes()
        except EOFError as error:
            self._process.join()
            end = end_of(self._process.exitcode or 0)
            raise SpeculatorError(f"The run {end}. Go on with run.resume.") from error
        self._process.join()
        if message.startswith(b"fault:"):
            raise SpeculatorError(message.decode().removeprefix("fault:"))
        return RunReport.model_validate_json(message)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def stop(self) -> None:
        """Ends the run where it stands; what it made is kept."""
        self._process.terminate()
        self._process.join()


def generate_data_process(plan: GenerationPlan) -> GenerationProcess:
    """Starts `generate_data` in a process of its own."""
    return GenerationProcess(plan)


def _generate(connection: Any, plan: str) -> None:
    from speculators_core.data_generation.workers import watch_parent

    watch_parent()
    try:
        report = generate_data(GenerationPlan.model_validate_json(plan))
        connection.send_bytes(report.model_dump_json().encode())
    except SpeculatorError as error:
        connection.send_bytes(f"fault:{error}".encode())


def print_report(report: RunReport, plan: GenerationPlan) -> None:
    table = Table(title="generate-data", show_header=False)
    table.add_column("what")
    table.add_column("number", justify="right")
    rate = report.num_tokens / report.seconds if report.seconds else 0.0
    lines: dict[str, Any] = {
        "examples": report.num_examples,
        "tokens": report.num_tokens,
        "bytes": report.size_bytes,
        "seconds": f"{report.seconds:.1f}",
        "tokens/s": f"{rate:.0f}",
        "units": report.num_units,
        "units of an earlier run": report.num_units_kept,
        "examples set aside": len(report.set_aside),
    }
    for name, value in lines.items():
        table.add_row(name, str(value))
    for name, value in _flat_counts(report.counts):
        table.add_row(name, str(value))
    console.print(table)
    if plan.sync.kind == "disk":
        console.print(f"wrote {plan.sync.path}")


def _flat_counts(counts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in counts.items():
        if isinstance(value, dict):
            yield from ((f"{name}: {reason}", number) for reason, number in value.items())
        else:
            yield name.replace("_", " "), value
