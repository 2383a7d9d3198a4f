"""Where units go, and which of them have arrived: shards in a folder, or a queue with a journal."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from speculators_core.data_generation.disk import DiskStore
from speculators_core.data_generation.engines import Failure
from speculators_core.data_generation.examples import GeneratedExample
from speculators_core.data_generation.stores import DataSink
from speculators_core.data_generation.units import Unit
from speculators_core.errors import SpeculatorError, first_line


class Target(Protocol):
    """Takes units."""

    def has(self, unit: Unit) -> bool:
        """Whether an earlier run has dealt with it."""

    def store(self, unit: Unit, results: Sequence[GeneratedExample | Failure]) -> int:
        """Takes what was made of a unit; the number of its bytes.

        Raises:
            SpeculatorError: it cannot be taken.
        """

    def close(self) -> None:
        """Returns when everything has arrived."""


class DiskTarget:
    """A shard a unit."""

    def __init__(self, store: DiskStore) -> None:
        self.disk = store

    def has(self, unit: Unit) -> bool:
        return self.disk.shard_path(unit.number).exists()

    def store(self, unit: Unit, results: Sequence[GeneratedExample | Failure]) -> int:
        self.disk.write_shard(unit.number, results)
        self.disk.take_acknowledged()
        return self.disk.shard_path(unit.number).stat().st_size

    def close(self) -> None:
        """The run itself writes the index, of all workers' shards."""


class QueueTarget:
    """Examples go to a queue; a unit of which all have arrived gets a line in the journal."""

    def __init__(self, sink: DataSink, journal: Path | None, worker: int) -> None:
        """Without a journal an interrupted run begins anew."""
        self.sink = sink
        self.journal = journal and journal / f"arrived-{worker:03d}.jsonl"
        self._arrived = _read_journals(journal) if journal else set()
        self._missing: dict[int, set[str]] = {}
        self._unit_of: dict[str, int] = {}

    def has(self, unit: Unit) -> bool:
        return unit.number in self._arrived

    def store(self, unit: Unit, results: Sequence[GeneratedExample | Failure]) -> int:
        made = [result for result in results if isinstance(result, GeneratedExample)]
        self._missing[unit.number] = {example.key for example in made}
        self._unit_of |= {example.key: unit.number for example in made}
        self.sink.write_batch(made)
        self._note_arrived()
        return sum(example.size_bytes for example in made)

    def close(self) -> None:
        self.sink.close()
        self._note_arrived()

    def _note_arrived(self) -> None:
        for key in self.sink.take_acknowledged():
            self._missing[self._unit_of.pop(key)].discard(key)
        whole = [number for number, missing in self._missing.items() if not missing]
        for number in whole:
            del self._missing[number]
        if whole and self.journal is not None:
            try:
                with self.journal.open("a", encoding="utf-8") as file:
                    file.write("".join(f"{json.dumps({'unit': number})}\n" for number in whole))
            except OSError as error:
                raise SpeculatorError(f"{self.journal}: {first_line(error)}.") from error


def _read_journals(folder: Path) -> set[int]:
    """Units that have arrived; the last line of a killed run may be half-written."""
    arrived = set()
    for journal in sorted(folder.glob("arrived-*.jsonl")):
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                arrived.add(int(json.loads(line)["unit"]))
            except (ValueError, KeyError, TypeError):
                continue
    return arrived
