"""Files of rows: every way to write the same rows is read as the same."""

import gzip
import json

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculators_core.errors import SpeculatorError
from speculators_core.texts.row_files import read_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.none() | st.booleans() | st.integers() | TEXT
ROWS = st.lists(st.dictionaries(TEXT, VALUES), max_size=5)


def write(path, rows, ascii_only=False, end=b"\n", before=b""):
    lines = (json.dumps(row, ensure_ascii=ascii_only).encode() for row in rows)
    path.write_bytes(before + b"".join(line + end for line in lines))
    return path


@given(rows=ROWS, ascii_only=st.booleans(), end=st.sampled_from([b"\n", b"\r\n", b"\n \n\n"]),
       before=st.sampled_from([b"", b"\xef\xbb\xbf"]))  # fmt: skip
def test_any_text_in_a_row_comes_back(tmp_path_factory, rows, ascii_only, end, before):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    write(path, rows, ascii_only, end, before)
    assert [row for _, row in read_rows(path)] == rows


def test_compressed_and_parquet_files_are_read_as_plain_ones(tmp_path):
    rows = [{"prompt": "a\u2028b"}, {"prompt": "c"}]
    plain = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pyarrow.output_stream(str(tmp_path / "rows.jsonl.zst"), compression="zstd") as file:
        file.write(plain.read_bytes())
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in tmp_path.iterdir():
        assert [row for _, row in read_rows(path)] == rows, path


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("rows.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3"),
        ("rows.jsonl", b'{"a": 1}\n[1]\n', "line 2: found [1], expected one JSON object"),
        ("rows.jsonl", b'{"a": "\xff"}\n', "line 1"),
        ("rows.jsonl", b"[" * 100_000, "line 1"),
        ("rows.jsonl.gz", b"not compressed", "rows.jsonl.gz: not a readable file"),
        ("rows.jsonl.zst", b"not compressed", "rows.jsonl.zst: not a readable file"),
        ("rows.parquet", b"not parquet", "rows.parquet: not a readable file"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_place(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpeculatorError) as error:
        list(read_rows(tmp_path / name))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(SpeculatorError, match=r"none\.jsonl: not a readable file"):
        list(read_rows(tmp_path / "none.jsonl"))
