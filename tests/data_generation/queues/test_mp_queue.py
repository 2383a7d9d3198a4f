"""Shared memory: who can open it, how it grows, what is left of it."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
from contextlib import closing
from pathlib import Path

import pytest

from speculators_core.data_generation.queues.frames import FrameError, SharedFile
from speculators_core.data_generation.queues.mp_queue import MPQueueStore
from speculators_core.data_generation.queues.shared_memory import (
    PREFIX,
    FilePool,
    FileReader,
    PrivateFolder,
    layout,
    rounded,
    sweep,
)
from speculators_core.errors import SpeculatorError
from tests.data_generation.queues.queue_processes import (
    LONG_S,
    SCHEMA,
    consume,
    digest,
    leftovers,
    line_of,
    lines_in,
    make_example,
    make_sync,
    open_sink,
    open_source,
    produce,
    start,
    wait_until,
)
from tests.data_generation.queues.test_frames import SCHEMAS
from tests.data_generation.queues.test_queues import in_thread


@pytest.fixture
def pool():
    with_folder = FilePool(SCHEMA)
    yield with_folder
    with_folder.remove()


def written(pool, number, **options):
    example = make_example(number, pool.schema, **options)
    return example, *pool.write(pool.schema.encode(example))


def read(reader, example, place):
    """The example, or None where it is gone."""
    num_tokens = len(example.input_ids)
    tensors = reader.read(reader.open(place, num_tokens), place.ticket, num_tokens)
    if tensors is None:
        return None
    return reader.schema.decode(example.key, example.num_prompt_tokens, tensors, "here")


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))
def test_what_is_written_is_read_byte_for_byte(schema):
    pool, reader = FilePool(schema), FileReader(schema, 4)
    example, _, place = written(pool, 5)
    found = read(reader, example, place)
    tensors = schema.encode(example)
    stored = schema.decode(example.key, example.num_prompt_tokens, tensors, "here")
    assert digest(found) == digest(stored)
    pool.remove()
    assert digest(found) == digest(stored)


def test_a_reader_sees_that_its_example_was_taken_back(pool):
    reader = FileReader(SCHEMA, 4)
    first, file, first_place = written(pool, 6)
    assert digest(read(reader, first, first_place)) == digest(first)
    pool.give_back(file)
    second, _, second_place = written(pool, 6)
    assert second_place.path == first_place.path
    assert read(reader, first, first_place) is None
    assert digest(read(reader, second, second_place)) == digest(second)


def test_files_are_used_again_and_grow_with_the_examples(pool):
    folder = Path(written(pool, 1)[2].path).parent
    for num_tokens in (5, 9, 4000, 3900, 9000, 20):
        _, file, _ = written(pool, 1, num_tokens=num_tokens)
        pool.give_back(file)
        assert len(list(folder.iterdir())) == 2
    sizes = sorted(file.stat().st_size for file in folder.iterdir())
    assert sizes == [2**16, rounded(layout(SCHEMA, 9000)[1])]


def test_there_are_no_more_files_than_examples_under_way():
    before, sync = leftovers(), make_sync("mp_queue", queue_size=3)
    with closing(open_source("mp_queue", sync)) as source:
        sink = open_sink(sync, source.url)
        reader = source.read()
        for number in range(50):
            sink.write(make_example(number))
            next(reader)
        folders = [Path("/dev/shm", name) for name in leftovers() - before]
        assert sum(file.is_file() for folder in folders for file in folder.iterdir()) <= 3
        with in_thread(sink.close):
            assert list(reader) == []


@pytest.mark.parametrize("size_bytes", [1, 2**16, 2**16 + 1, 10**6, 10**9 + 7, 2**31])
def test_rounding_wastes_little(size_bytes):
    assert size_bytes <= rounded(size_bytes) <= max(2**16, size_bytes * 1.13, size_bytes + 2**16)


def test_tensors_lie_apart_and_aligned():
    for schema in SCHEMAS.values():
        offsets, end = layout(schema, 7)
        sizes = [t.nbytes for t in schema.encode(make_example(1, schema, num_tokens=7)).values()]
        ends = [offset + size for offset, size in zip(offsets.values(), sizes, strict=True)]
        assert all(offset % 64 == 0 for offset in offsets.values())
        assert all(a <= b for a, b in zip([8, *ends], [*offsets.values(), end], strict=True))


def full(monkeypatch, num_times):
    """So often there is no room."""
    left, real = [num_times], os.posix_fallocate

    def allocate(handle, offset, size):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)


def test_where_memory_is_full_the_disk_is_used(monkeypatch, pool, tmp_path, caplog):
    monkeypatch.setattr(pool, "_places", [tmp_path])
    early, _, early_place = written(pool, 3)
    full(monkeypatch, 1)
    late, _, late_place = written(pool, 4, num_tokens=5000)
    assert "/dev/shm is full" in caplog.text
    assert Path(late_place.path).is_relative_to(tmp_path)
    reader = FileReader(SCHEMA, 4)
    for example, place in [(early, early_place), (late, late_place)]:
        assert digest(read(reader, example, place)) == digest(example)
    pool.remove()
    assert list(tmp_path.iterdir()) == []


def test_where_the_disk_is_full_too_one_line_says_so(monkeypatch, pool):
    full(monkeypatch, 9)
    with pytest.raises(SpeculatorError, match="has no room for an example; expected 65536 .*Free"):
        written(pool, 3)
    monkeypatch.undo()
    written(pool, 3)


@pytest.fixture
def strange(pool, tmp_path):
    """Places where no example is."""
    example, _, place = written(pool, 3)
    folder = Path(place.path).parent
    other = tmp_path / folder.name
    other.mkdir(mode=0o755)
    (other / "file").write_bytes(bytes(2**16))
    (folder / "link").symlink_to(place.path)
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    return {
        "not private": other / "file",
        "elsewhere": tmp_path / "file",
        "link": folder / "link",
        "folder": folder / "folder",
        "empty": folder / "empty",
        "missing": folder / "missing",
        "zero": f"{folder}/\0",
        "up": folder / ".." / ".." / "etc" / "passwd",
        "relative": "file",
    }


@pytest.mark.parametrize(
    "which",
    "not private,elsewhere,link,folder,empty,missing,zero,up,relative".split(","),
)
def test_a_file_that_is_not_a_queues_is_not_opened(strange, which):
    with pytest.raises(FrameError, match="not a queue's folder|cannot be"):
        FileReader(SCHEMA, 4).open(SharedFile(path=str(strange[which]), ticket=1), 3)


def test_a_file_that_is_too_small_is_refused(pool):
    _, _, place = written(pool, 3)
    with pytest.raises(FrameError, match="has 65536 bytes, expected"):
        FileReader(SCHEMA, 4).open(place, 5000)


def test_a_reader_keeps_as_many_files_open_as_it_may(pool):
    reader = FileReader(SCHEMA, 3)
    places = [written(pool, 3)[2] for _ in range(8)]
    for place in places:
        reader.open(place, 3)
    assert list(reader._open) == [place.path for place in places[-3:]]


def test_sweeping_leaves_what_is_alive_or_not_ours():
    alive = PrivateFolder(Path("/dev/shm"))
    dead = alive.path.with_name(PREFIX + "0" * 16)
    dead.mkdir(mode=0o700)
    open_to_all = alive.path.with_name(PREFIX + "1" * 16)
    open_to_all.mkdir(mode=0o755)
    other = alive.path.with_name(PREFIX + "theirs")
    other.mkdir(mode=0o700)
    try:
        sweep()
        assert [folder.exists() for folder in (alive.path, dead, open_to_all, other)] == [
            True,
            False,
            True,
            True,
        ]
    finally:
        alive.remove()
        for folder in (dead, open_to_all, other):
            shutil.rmtree(folder, ignore_errors=True)
    assert not alive.path.exists()


def test_only_this_user_can_reach_a_source():
    with closing(MPQueueStore.source(SCHEMA, make_sync("mp_queue"))) as source:
        folder = Path(source.url.removeprefix("ipc://")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o755)
        with pytest.raises(SpeculatorError, match="is not an open queue"):
            open_sink(make_sync("mp_queue"), source.url)
    with pytest.raises(SpeculatorError, match=re.escape(f"{source.url} is not an open queue")):
        open_sink(make_sync("mp_queue"), source.url)
    with pytest.raises(SpeculatorError, match="sync.urls is missing"):
        open_sink(make_sync("mp_queue"))


def test_a_spawned_process_sends_without_a_word_on_leaving(tmp_path, capfd):
    sync = make_sync("mp_queue")
    with closing(open_source("mp_queue", sync)) as source:
        there = sync.model_copy(update={"urls": (source.url,)})
        arguments = (there, "spawned", range(5), tmp_path / "done")
        child = multiprocessing.get_context("spawn").Process(target=produce, args=arguments)
        child.start()
        found = [line_of(example) for example in source.read()]
        child.join(LONG_S)
    assert found == [line_of(make_example(number)) for number in range(5)]
    assert child.exitcode == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("victims", ["producer", "consumer", "both"])
def test_nothing_is_left_of_those_that_were_killed(victims, tmp_path):
    before, log = leftovers(), tmp_path / "log"
    sync = make_sync("mp_queue", heartbeat_s=0.1)
    consumer = start(consume, sync, "", {"timeout_s": 0.3}, log, 0.01)
    wait_until(lambda: lines_in(log))
    there = sync.model_copy(update={"urls": (lines_in(log)[0],)})
    producer = start(produce, there, "p", range(10**6), tmp_path / "p")
    wait_until(lambda: len(lines_in(log)) > 5)
    folders = leftovers() - before  # theirs, and perhaps some of other tests'
    assert len(folders) >= 2
    if victims != "consumer":
        os.kill(producer.pid, signal.SIGKILL)
    if victims != "producer":
        os.kill(consumer.pid, signal.SIGKILL)
    if victims != "producer":
        consumer.join(LONG_S)
        producer.kill()
        producer.join(LONG_S)
        with closing(MPQueueStore.source(SCHEMA, sync)):
            wait_until(lambda: not leftovers() & folders)
    wait_until(lambda: not leftovers() & folders)
