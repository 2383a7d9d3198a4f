"""Data sets of files, folders and the hub, opened.

Python code that a data set ships is never run.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from datasets import (
    Dataset,
    DatasetBuilder,
    Features,
    IterableDataset,
    Json,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset_builder,
    load_from_disk,
)

from speculators_core.data_generation.settings import FORMATS, DatasetConfig
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import Roots
from speculators_core.texts.row_files import Row, read_rows


def open_rows(config: DatasetConfig, roots: Roots) -> tuple[Dataset | IterableDataset, list[str]]:
    """The rows of a data set's split, in their order, and the names of their columns.

    Raises:
        SpeculatorError: there is no such data set, configuration or split, it is damaged, or a
            file of it lies outside the roots.
    """
    where = f"{config.path} (split {config.split})"
    path = config.local_path()
    try:
        rows = _open_hub(config) if path is None else _open_local(config, path, roots)
        columns = list(rows.column_names or next(iter(rows), {}))
    except SpeculatorError:
        raise
    except Exception as error:  # datasets raises a dozen kinds, its own and its backends'
        reason = first_line(error.__cause__ or error)
        raise SpeculatorError(
            f"{where} cannot be opened: {reason}; expected a file, a folder or a hub id with this "
            "split. Correct the data set's `path`, `name` or `split`."
        ) from error
    if not columns:
        raise SpeculatorError(
            f"{where} holds no rows, expected at least 1. Correct the data set's `split`, or "
            "remove the data set."
        )
    return rows, columns


def _open_local(config: DatasetConfig, path: Path, roots: Roots) -> Dataset | IterableDataset:
    roots = roots.with_own(path)
    is_text = path.suffix == ".txt"
    if config.sample_by != "line" and not is_text:
        raise SpeculatorError(
            f"{config.path}: `sample_by` is {config.sample_by!r}, which only text files (.txt) "
            "support; expected line. Remove `sample_by`."
        )
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _open_saved(config, path, roots)
        builder = load_dataset_builder(str(path), config.name)
    elif path.suffix not in FORMATS:
        raise SpeculatorError(
            f"{config.path}: the file's suffix is {path.suffix!r}; expected one of "
            f"{', '.join(FORMATS)}, or a folder. Convert or rename the file."
        )
    elif config.name is not None:
        raise SpeculatorError(
            f"{config.path}: `name` is {config.name!r}, but a file has no configurations; expected "
            "a folder or a hub id. Remove `name`."
        )
    elif path.suffix == ".jsonl":
        return _open_lines(config, path)
    else:
        options: dict[str, object] = {"sample_by": config.sample_by} if is_text else {}
        builder = load_dataset_builder(FORMATS[path.suffix], data_files=str(path), **options)
    for file in _data_files(builder):
        if "://" in file:
            raise _foreign(config, file)
        roots.check(file)
    return _take_split(builder, config, is_streamed=bool(config.streaming))


def _open_lines(config: DatasetConfig, path: Path) -> Dataset | IterableDataset:
    """JSON lines, read as prompts are: the reader of `datasets` stops at an empty line, and one
    that is nested deeply ends the process.
    """
    state = path.stat()
    # No lists: `datasets` takes their items for shards.
    given = {"path": str(path), "version": f"{state.st_size} {state.st_mtime_ns}"}
    features = _features(path)
    if not features:
        return Dataset.from_dict({})
    if config.streaming and config.split != "train":
        raise SpeculatorError(
            f"{config.path}: `split` is {config.split!r}; expected train, the whole file, which "
            "is all that can be streamed. Correct `split`, or remove `streaming`."
        )
    if config.streaming:
        return IterableDataset.from_generator(_lines, features=features, gen_kwargs=given)
    rows = Dataset.from_generator(_lines, features=features, gen_kwargs=given)
    return _part({"train": rows}, config.split)


def _lines(path: str, version: str) -> Iterator[Row]:
    """``version`` makes a copy in the cache of `datasets` that of this file's content."""
    return (row for _, row in read_rows(Path(path)))


def _features(path: Path) -> Features:
    """The types of all rows' values; lists and objects as JSON of any shape."""
    kinds: dict[str, set[type]] = {}
    for _, row in read_rows(path):
        for key, value in row.items():
            is_large = type(value) is int and not -(2**63) <= value < 2**63
            kinds.setdefault(key, set()).add(float if is_large else type(value))
    plain = {str: "string", int: "int64", float: "float64", bool: "bool"}
    features: dict[str, Value | Json] = {}
    for key, found in kinds.items():
        (kind, *others) = (found - {type(None)}) or {str}
        # A text such as "9" would be read as a number if it were taken for JSON.
        features[key] = Value(plain[kind]) if kind in plain and not others else Json()
    return Features(features)


def _open_hub(config: DatasetConfig) -> Dataset | IterableDataset:
    """A data set of the hub; files elsewhere that its description names are refused."""
    builder = load_dataset_builder(config.path, config.name)
    for file in _data_files(builder):
        if not file.startswith("hf://"):
            raise _foreign(config, file)
    is_part = "[" in config.split  # which cannot be streamed
    return _take_split(
        builder, config, not is_part if config.streaming is None else config.streaming
    )


def _open_saved(config: DatasetConfig, path: Path, roots: Roots) -> Dataset | IterableDataset:
    """A data set that `save_to_disk` wrote, memory-mapped; without splits it is `train`."""
    saved = load_from_disk(path)
    splits = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    for rows in splits.values():
        for file in rows.cache_files:
            roots.check(file["filename"])
    return _part(splits, config.split)


def _part(splits: Mapping[str, Dataset], split: str) -> Dataset:
    """The rows of a split, or of a part of one."""
    lengths = {name: len(rows) for name, rows in splits.items()}
    parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    return concatenate_datasets(
        [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    ).with_format(None)


def _take_split(
    builder: DatasetBuilder, config: DatasetConfig, is_streamed: bool
) -> Dataset | IterableDataset:
    if is_streamed:
        return builder.as_streaming_dataset(split=config.split)
    builder.download_and_prepare()
    return builder.as_dataset(split=config.split)


def _foreign(config: DatasetConfig, file: str) -> SpeculatorError:
    return SpeculatorError(
        f"{config.path} lists {file}; expected only files of the data set itself. Download that "
        "file, and name it as a data set."
    )


def _data_files(builder: DatasetBuilder) -> Iterator[str]:
    """Files that a builder reads; the archive's path for a file inside one."""
    for files in (builder.config.data_files or {}).values():
        yield from (str(file).rpartition("::")[2] for file in files)
