"""`DiskStore`: a folder of shards.

    store.json              schema of the examples, and the options they were made from
    shards/000000.safetensors
    index.parquet           one row per example: key, shard, offset and numbers of tokens
    report.json             written when the run is complete

A shard gets its name once it is whole, and holds the same examples in every run of the same plan,
so existing shards need not be generated again. The index can be rebuilt from the shards at any
time.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import Int64
from pydantic import Field, JsonValue, ValidationError

from speculators_core.data_generation.examples import Failure, GeneratedExample, Schema
from speculators_core.data_generation.stores.shards import (
    SUFFIXES,
    Shard,
    ShardHeader,
    number_of,
    read_header,
    write_shard,
)
from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.files import make_folder, replaced, sync, sync_names, write_text
from speculators_core.settings import Settings, flat

MANIFEST = "store.json"
INDEX = "index.parquet"
REPORT = "report.json"
SHARDS = "shards"
SHARD_NAME = re.compile(r"(\d{6,9})\.safetensors(\.zst)?")
OPEN_SHARDS = 16
"""Shards that a process keeps mapped; only one where they are compressed and held in memory."""
INDEX_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "shard": pa.int32(),
        "start": pa.int64(),
        "num_tokens": pa.int32(),
        "num_prompt_tokens": pa.int32(),
        "num_trained": pa.int32(),
    }
)


class Manifest(Settings):
    """Schema of the examples, and the options they were made from."""

    format: Literal["speculators-data-1"] = "speculators-data-1"
    content: Schema
    made_from: dict[str, JsonValue] = Field(default_factory=dict)
    """Options that determine the bytes; a run with other options cannot resume here."""
    versions: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def read_file(cls, path: Path) -> Self:
        """Raises:
        SpeculatorError: it cannot be read, or is damaged.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SpeculatorError(
                f"{path} cannot be read: {first_line(error)}; expected the manifest of a run. "
                "Check its permissions, or copy it again."
            ) from error
        except ValidationError as error:
            raise SpeculatorError(
                f"{path} is damaged: {first_fault(error)}; expected the manifest as a run wrote "
                "it. Copy it again, or generate into another folder."
            ) from error


class DiskStore:
    """Both sides of a store on disk: a `DataSink`, a `DataSource`, and examples by number."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Use `create` or `open`, which check the folder."""
        self.folder = folder
        self.manifest = manifest
        self.schema = manifest.content
        self._open: OrderedDict[Path, Shard] = OrderedDict()
        self._verified: dict[Path, bytearray] = {}
        self._places: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._paths: dict[int, Path] = {}
        self._buffer: list[GeneratedExample] = []
        self._acknowledged: list[str] = []
        self.shard_tokens = 65_536
        """Tokens after which `write` ends a shard."""
        self.suffix = SUFFIXES["none"]

    # ---- the folder ----

    @classmethod
    def create(
        cls,
        folder: Path,
        schema: Schema,
        *,
        made_from: Mapping[str, JsonValue] | None = None,
        versions: Mapping[str, str] | None = None,
        resume: bool = False,
        compression: str = "none",
        shard_tokens: int = 65_536,
    ) -> Self:
        """A new store, or with ``resume`` the existing one.

        Raises:
            SpeculatorError: the folder holds something else, or a store with other options.
        """
        manifest = Manifest(
            content=schema, made_from=dict(made_from or {}), versions=dict(versions or {})
        )
        if (folder / MANIFEST).exists():
            found = cls.open(folder).manifest
            if not resume:
                raise SpeculatorError(
                    f"{folder} already holds a store, expected a new folder. Pass --run.resume to "
                    "resume its run, or choose another folder with --sync.path."
                )
            check_same(folder, found, manifest)
        elif folder.exists() and any(_visible(folder)):
            raise SpeculatorError(
                f"{folder} holds other files; expected a store, or a new or empty folder. Choose "
                "another folder with --sync.path."
            )
        else:
            try:
                make_folder(folder / SHARDS)
                write_text(folder / MANIFEST, manifest.model_dump_json(indent=2))
            except OSError as error:
                raise SpeculatorError(
                    f"{folder} cannot be made: {error.strerror or first_line(error)}; expected a "
                    "writable place. Choose another folder with --sync.path."
                ) from error
        store = cls(folder, manifest)
        store.suffix = SUFFIXES[compression]
        store.shard_tokens = shard_tokens
        return store

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The store in a folder.

        Raises:
            SpeculatorError: there is none, or its manifest is damaged.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise SpeculatorError(
                f"{folder} holds no {MANIFEST}; expected a store of `speculators generate-data`. "
                "Name its folder, or generate one there."
            )
        return cls(folder, Manifest.read_file(folder / MANIFEST))

    def shard_path(self, number: int) -> Path:
        return self.folder / SHARDS / f"{number:06d}{self.suffix}"

    def shard_paths(self) -> list[Path]:
        """Existing shards in order of their numbers.

        Raises:
            SpeculatorError: one is a link to a place outside the store.
        """
        root = (self.folder / SHARDS).resolve()
        found: dict[int, Path] = {}
        for path in sorted((self.folder / SHARDS).glob("*.safetensors*")):
            match = SHARD_NAME.fullmatch(path.name)
            if match is None:
                continue
            if path.resolve().parent != root:
                raise SpeculatorError(
                    f"{path} is a link to {path.resolve()}, expected a file in {root}. Replace "
                    "the link with a copy of the shard."
                )
            found[int(match[1])] = path
        return [found[number] for number in sorted(found)]

    @property
    def is_complete(self) -> bool:
        """Whether the run that made it is complete."""
        return (self.folder / REPORT).exists()

    def complete(self, report: str) -> None:
        """Marks the run as complete and writes its report (JSON).

        All shards are flushed to disk first, so a shard that a power failure damages belongs to an
        incomplete run, where `run.repair` finds it by its checksums.
        """
        for path in self.shard_paths():
            sync(path)
        sync_names(self.folder / SHARDS)
        write_text(self.folder / REPORT, report)

    def headers(self, leave_out: Collection[Path] = ()) -> Iterator[tuple[Path, ShardHeader]]:
        """Paths and headers of the shards, in order of their numbers.

        Raises:
            SpeculatorError: one is damaged.
        """
        return ((path, read_header(path)) for path in self.shard_paths() if path not in leave_out)

    def check_numbers(self, below: int) -> None:
        """Raises SpeculatorError if a shard belongs to no unit of the run."""
        for path in self.shard_paths():
            if number_of(path) >= below:
                raise SpeculatorError(
                    f"{path} does not belong to this run; expected shards 0 to {below - 1}, since "
                    f"the data now make {below} units. Restore the data, or choose another folder."
                )

    def set_aside(self) -> dict[str, str]:
        """Reasons of the examples that the engine failed on, by key."""
        return {
            aside.key: aside.reason for _, header in self.headers() for aside in header.set_aside
        }

    def clean(self) -> None:
        """Prepares for a run: removes the report, and the partial files of a killed run."""
        (self.folder / REPORT).unlink(missing_ok=True)
        for folder in (self.folder, self.folder / SHARDS):
            for path in folder.glob(".*.part"):
                path.unlink(missing_ok=True)

    def find_damage(self) -> dict[Path, str]:
        """Damaged shards and their faults; reads every byte."""
        found = {}
        for path in self.shard_paths():
            try:
                for _ in Shard(path, self.schema):
                    pass
            except SpeculatorError as error:
                found[path] = str(error)
        return found

    def find_set_aside(self, leave_out: Collection[Path] = ()) -> dict[Path, str]:
        """Shards that list failed examples, each with their number."""
        return {
            path: f"{len(header.set_aside)} of its examples were set aside"
            for path, header in self.headers(leave_out)
            if header.set_aside
        }

    @property
    def size_bytes(self) -> int:
        """Size of all shards."""
        return sum(path.stat().st_size for path in self.shard_paths())

    # ---- writing ----

    def write_shard(
        self,
        number: int,
        results: Sequence[GeneratedExample | Failure],
        unit_digest: str = "",
    ) -> ShardHeader:
        """Writes a shard, with its failures and the digest of its unit in the header.

        Raises:
            SpeculatorError: it cannot be written.
        """
        path = self.shard_path(number)
        header = write_shard(path, number, self.schema, results, unit_digest)
        self._open.pop(path, None)
        self._verified.pop(path, None)
        self._places = None
        self._acknowledged += [entry.key for entry in header.entries]
        return header

    def write(self, example: GeneratedExample) -> None:
        """Buffers an example, which is written when its shard is full or at `close`."""
        self._buffer.append(example)
        if sum(len(waiting.input_ids) for waiting in self._buffer) >= self.shard_tokens:
            self._flush()

    def write_batch(self, examples: Sequence[GeneratedExample]) -> None:
        for example in examples:
            self.write(example)

    def take_acknowledged(self) -> list[str]:
        taken, self._acknowledged = self._acknowledged, []
        return taken

    def _flush(self) -> None:
        if not self._buffer:
            return
        paths = self.shard_paths()
        number = number_of(paths[-1]) + 1 if paths else 0
        self.write_shard(number, self._buffer)
        self._buffer = []

    def close(self) -> None:
        """Writes the buffered examples and the index."""
        self._flush()
        self.write_index()
        self._open.clear()

    # ---- the index ----

    def write_index(self) -> None:
        """Writes ``index.parquet``.

        Raises:
            SpeculatorError: a shard is damaged, or there is no room.
        """
        try:
            with replaced(self.folder / INDEX) as temporary:
                parquet.write_table(self._table(), temporary)
        except OSError as error:
            raise SpeculatorError(
                f"{self.folder / INDEX} cannot be written: {first_line(error)}; expected a "
                "writable folder. Make room, then pass --run.resume to resume."
            ) from error

    def _table(self) -> pa.Table:
        """One row per example, from the shards' headers."""
        batches = [pa.RecordBatch.from_pylist(rows, INDEX_SCHEMA) for rows in self._rows()]
        table = pa.Table.from_batches(batches, INDEX_SCHEMA)
        return table.replace_schema_metadata({"shards": self._listing()})

    def _rows(self) -> Iterator[list[dict[str, Any]]]:
        """Rows of the index, shard by shard."""
        for _, header in self.headers():
            yield [
                {"shard": header.number, **entry.model_dump(exclude={"checksum"})}
                for entry in header.entries
            ]

    def _listing(self) -> str:
        """Names and sizes of the shards, which show whether an index is current."""
        return json.dumps([(path.name, path.stat().st_size) for path in self.shard_paths()])

    @property
    def index(self) -> pa.Table:
        """Examples in order: read from ``index.parquet`` where it is current, else rebuilt."""
        try:
            table = parquet.read_table(self.folder / INDEX)
        except (OSError, pa.ArrowInvalid):
            return self._table()
        is_current = (table.schema.metadata or {}).get(b"shards") == self._listing().encode()
        return table if is_current else self._table()

    # ---- reading ----

    def shard(self, path: Path) -> Shard:
        """An open shard; the last few stay open.

        Raises:
            SpeculatorError: it is damaged.
        """
        if path not in self._open:
            self._open[path] = Shard(path, self.schema, self._verified.get(path))
            self._verified[path] = self._open[path].verified
            most = 1 if path.suffix == ".zst" else OPEN_SHARDS
            while len(self._open) > most:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]

    @property
    def lengths(self) -> Int64[np.ndarray, "examples"]:
        """Number of tokens of each example."""
        return self._read_places()[2]

    def _read_places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard of each example, its index within the shard, and its number of tokens."""
        if self._places is None:
            index = self.index
            shards = index.column("shard").to_numpy().astype(np.int64)
            first = np.searchsorted(shards, shards)
            lengths = index.column("num_tokens").to_numpy().astype(np.int64)
            self._places = (shards, np.arange(len(shards)) - first, lengths)
            self._paths = {number_of(path): path for path in self.shard_paths()}
        return self._places

    def __len__(self) -> int:
        return len(self._read_places()[0])

    def __getitem__(self, number: int) -> GeneratedExample:
        shards, within, _ = self._read_places()
        return self.shard(self._paths[int(shards[number])]).read(int(within[number]))

    def read(self) -> Iterator[GeneratedExample]:
        """Every example, in the order of the run."""
        for path in self.shard_paths():
            yield from self.shard(path)


def _visible(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def check_same(folder: Path, found: Manifest, expected: Manifest) -> None:
    """Raises SpeculatorError unless a run with these options would make the same bytes."""
    if found.content != expected.content:
        pairs = (found.content.model_dump(), expected.content.model_dump())
    else:
        pairs = (flat(found.made_from), flat(expected.made_from))
    for key in sorted(pairs[0].keys() | pairs[1].keys()):
        before, now = pairs[0].get(key), pairs[1].get(key)
        if before != now:
            raise SpeculatorError(
                f"{folder} was made with {key} {before!r:.80}, but it is now {now!r:.80}; expected "
                "the same options, so that all shards match. Restore the option, or choose another "
                "folder."
            )
