"""Targets of units: store, or queue with journal."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

from speculators_core.data_generation.examples import Failure, GeneratedExample
from speculators_core.data_generation.runs.units import Unit
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.data_generation.stores.protocols import DataSink
from speculators_core.data_generation.stores.shards import read_header
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import open_own


class Target(Protocol):
    """Stores units, and knows which are stored already."""

    def has(self, unit: Unit) -> bool:
        """Whether an earlier run has completed this unit."""

    def store(self, unit: Unit, results: Sequence[GeneratedExample | Failure]) -> int:
        """Stores the results of a unit and returns their size in bytes.

        Raises:
            SpeculatorError: they cannot be stored.
        """

    def close(self) -> None:
        """Returns when everything has arrived."""

    def abort(self) -> None:
        """Stops at once after an error; may be called from any thread."""


class DiskTarget:
    """One shard per unit."""

    def __init__(self, store: DiskStore) -> None:
        self.disk = store

    def has(self, unit: Unit) -> bool:
        """Whether the unit's shard exists; raises SpeculatorError if it holds other texts."""
        path = self.disk.shard_path(unit.number)
        if not path.exists():
            return False
        if read_header(path).unit_digest != unit.digest:
            raise SpeculatorError(
                f"{path} was made from other texts than unit {unit.number} now has; expected the "
                "same data as in the run that wrote it. Restore the data, or choose another folder."
            )
        return True

    def store(self, unit: Unit, results: Sequence[GeneratedExample | Failure]) -> int:
        self.disk.write_shard(unit.number, results, unit.digest)
        self.disk.take_acknowledged()
        return self.disk.shard_path(unit.number).stat().st_size

    def close(self) -> None:
        """Does nothing: the run writes the index once all workers are done."""

    def abort(self) -> None:
        """Does nothing: a shard is written whole or not at all."""


class QueueTarget:
    """Sends examples to a queue; a journal lists those that a consumer has acknowledged."""

    def __init__(self, sink: DataSink, folder: Path | None, worker: int) -> None:
        """Without a ``folder`` there is no journal, and an interrupted run starts over."""
        self.sink = sink
        self._file = None if folder is None else folder / f"arrived-{worker:03d}.jsonl"
        self._arrived = Arrived() if folder is None else Arrived.read(folder)
        self._unit_of: dict[str, int] = {}
        self._under_way: Counter[int] = Counter()

    def has(self, unit: Unit) -> bool:
        return all(self._arrived.has(unit.number, example.key) for example in unit.examples)

    def store(self, unit: Unit, results: Sequence[GeneratedExample | Failure]) -> int:
        """Sends what has not arrived of a unit, which is always generated whole."""
        made = [
            result
            for result in results
            if isinstance(result, GeneratedExample)
            and not self._arrived.has(unit.number, result.key)
        ]
        for example in made:
            self._unit_of[example.key] = unit.number
        self._under_way[unit.number] = len(made)
        if not made:
            self._write([{"unit": unit.number}])
        for example in made:
            self.sink.write(example)
            self._note_arrived()
        return sum(example.size_bytes for example in made)

    def close(self) -> None:
        self.sink.close()
        self._note_arrived()

    def abort(self) -> None:
        self.sink.abort()
        self._note_arrived()

    def _note_arrived(self) -> None:
        lines = []
        for key in self.sink.take_acknowledged():
            unit = self._unit_of.pop(key)
            self._under_way[unit] -= 1
            lines.append({"unit": unit, "key": key} if self._under_way[unit] else {"unit": unit})
        self._write(lines)

    def _write(self, lines: Sequence[Mapping[str, object]]) -> None:
        """Each line begins with a newline: the one before it may be half-written."""
        if not lines or self._file is None:
            return
        try:
            with open_own(self._file) as file:
                file.write("".join(f"\n{json.dumps(line)}" for line in lines))
        except OSError as error:
            raise SpeculatorError(
                f"journal {self._file} cannot be written: {first_line(error)}; expected a regular "
                "file in a writable folder. Make room, then pass --run.resume to resume."
            ) from error


class Arrived:
    """Units and examples that the journals of a run list."""

    def __init__(self) -> None:
        self.units: set[int] = set()
        """Units that have arrived completely."""
        self.keys: set[str] = set()
        """Examples that have arrived from other units."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads all workers' journals, skipping lines that a killed worker left half-written."""
        found, keys = cls(), {}
        for journal in sorted(folder.glob("arrived-*.jsonl")):
            for line in journal.read_text(encoding="utf-8").splitlines():
                try:
                    told = json.loads(line)
                    unit, key = int(told["unit"]), told.get("key")
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
                if key is None:
                    found.units.add(unit)
                elif isinstance(key, str):
                    keys[key] = unit
        found.keys = {key for key, unit in keys.items() if unit not in found.units}
        return found

    def has(self, unit: int, key: str) -> bool:
        return unit in self.units or key in self.keys
