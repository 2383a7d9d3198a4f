"""Rows of JSON lines and of Parquet files."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
from pydantic import JsonValue

from speculators_core.errors import SpeculatorError, first_line
from speculators_core.texts.messages import shown

PARQUET = ".parquet"
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", PARQUET)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Row = dict[str, JsonValue]


def is_row_file(path: Path) -> bool:
    """Whether a name is that of a file of rows, by its suffix."""
    return path.name.endswith(SUFFIXES)


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Numbers, from 1, and rows of a file. Of JSON lines the number is the line's.

    Lines end at line feeds alone, as JSON may hold any other line separator. A byte order mark and
    empty lines are skipped.

    Raises:
        SpeculatorError: the file is missing or damaged, or a row is not an object.
    """
    try:
        if path.suffix == PARQUET:
            yield from enumerate(parquet.read_table(path).to_pylist(), 1)
        else:
            yield from _read_lines(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise SpeculatorError(
            f"{path}: not a readable file of rows ({first_line(error)}); expected JSON lines "
            "(.jsonl, .jsonl.gz, .jsonl.zst) or Parquet. Correct the path, or write it again."
        ) from error


def _read_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with io.BufferedReader(pyarrow.input_stream(str(path), compression="detect")) as lines:
        for number, line in enumerate(lines, 1):
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if not content.strip():
                continue
            try:
                row = json.loads(content.decode())
                if b"\\ud" in content.lower():  # perhaps half a character, which is no text
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise SpeculatorError(
                    f"{path.name}, line {number}: {first_line(error)}; expected one JSON object. "
                    "Correct the line."
                ) from error
            if not isinstance(row, dict):
                raise SpeculatorError(
                    f"{path.name}, line {number}: found {shown(row)}, expected one JSON object. "
                    "Correct the line."
                )
            yield number, row
