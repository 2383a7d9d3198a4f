"""What has its name is on disk: the order of what the operating system is asked for."""

import errno
import os
from pathlib import Path

import pytest

from speculators_core.data_generation.stores.disk import INDEX, MANIFEST, REPORT, SHARDS, DiskStore
from speculators_core.errors import SpeculatorError
from speculators_core.files import replaced, write_text
from tests.data_generation.making import generated, schema


@pytest.fixture
def asked(monkeypatch):
    """Files and folders that were brought to disk, with their sizes, and names that were given."""
    told = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(file):
        path = Path(f"/proc/self/fd/{file}").resolve()
        told.append(
            ("names of", path) if path.is_dir() else ("bytes of", path, path.stat().st_size)
        )
        fsync(file)

    def note_replace(source, target):
        told.append(("name", Path(source), Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return told


def create(folder, compression="none"):
    return DiskStore.create(folder / "store", schema(), compression=compression)


def add_shard(store):
    store.write_shard(0, [generated(0, 300, store.schema)])
    return store.shard_path(0)


def add_index(store):
    store.write_index()
    return store.folder / INDEX


def add_report(store):
    store.complete("{}")
    return store.folder / REPORT


@pytest.mark.parametrize("add", [add_index, add_report])
def test_all_bytes_are_on_disk_before_the_name_and_the_name_after_it(tmp_path, asked, add):
    store = create(tmp_path)
    asked.clear()
    path = add(store)
    *_, (_, temporary, _), _, _ = asked
    assert asked[-3:] == [
        ("bytes of", temporary, path.stat().st_size),
        ("name", temporary, path),
        ("names of", path.parent),
    ]
    assert temporary.name.endswith(".part") and temporary.parent == path.parent


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_shards_are_on_disk_before_the_report_says_that_they_are(tmp_path, asked, compression):
    store = create(tmp_path, compression)
    asked.clear()
    path = add_shard(store)
    assert [told[0] for told in asked] == ["name"]  # a shard waits for no disk
    add_report(store)
    assert asked[1:3] == [
        ("bytes of", path, path.stat().st_size),
        ("names of", store.folder / SHARDS),
    ]
    assert asked[-2][2] == store.folder / REPORT


def test_a_new_store_is_on_disk_with_its_folders(tmp_path, asked):
    folder = create(tmp_path).folder
    assert [told[0] for told in asked] == ["names of", "names of", "bytes of", "name", "names of"]
    assert asked[3][2] == folder / MANIFEST and (folder / SHARDS).is_dir()
    assert [told[1] for told in (*asked[:2], asked[4])] == [tmp_path, folder, folder]


def test_what_cannot_reach_the_disk_gets_no_name(tmp_path, monkeypatch):
    store = create(tmp_path)

    def fail(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        SpeculatorError, match="index.parquet cannot be written: .*Input/output error"
    ):
        add_index(store)
    assert list((store.folder / SHARDS).iterdir()) == []
    assert {path.name for path in store.folder.iterdir()} == {MANIFEST, SHARDS}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_bring_names_to_disk_is_written_to(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def fail_on_folders(file):
        if Path(f"/proc/self/fd/{file}").resolve().is_dir():
            raise OSError(number, "not here")
        fsync(file)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    add_shard(create(tmp_path))
    assert len(DiskStore.open(tmp_path / "store")) == 1


def test_an_error_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
