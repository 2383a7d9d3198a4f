import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from speculators_core.data_generation.examples import Failure
from speculators_core.data_generation.stores.disk import INDEX, MANIFEST, OPEN_SHARDS, DiskStore
from speculators_core.data_generation.stores.shards import read_header
from speculators_core.errors import SpeculatorError
from tests.data_generation.making import assert_same, generated, schema

LENGTHS = (5, 1, 9, 3)
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "top-k": {"dtype": "bfloat16", "logits": "top-k", "top_k": 4},
    "full": {"logits": "full"},
    "no states": {"layer_ids": (), "has_last": False, "logits": "full"},
    "mean": {"reduce": "mean"},
}


@pytest.fixture
def filled(tmp_path):
    """A store of two shards, and what it holds."""
    store = DiskStore.create(tmp_path / "store", schema())
    examples = [generated(i, length, schema()) for i, length in enumerate(LENGTHS)]
    store.write_shard(0, examples[:2])
    store.write_shard(1, examples[2:])
    store.close()
    return store.folder, examples


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path, kind, compression):
    of = schema(**KINDS[kind])
    examples = [generated(i, length, of) for i, length in enumerate(LENGTHS)]
    store = DiskStore.create(tmp_path / "store", of, compression=compression, shard_tokens=6)
    store.write_batch(examples)
    store.close()
    again = DiskStore.open(store.folder)
    assert len(again.shard_paths()) == 3
    assert len(again) == len(examples)
    for found, expected in zip(again.read(), examples, strict=True):
        assert_same(found, expected)
    assert_same(again[2], examples[2])
    assert again.lengths.tolist() == list(LENGTHS)


def test_float8_keeps_a_token_to_a_sixteenth_of_its_largest_number(tmp_path):
    of = schema(dtype="float8_e4m3fn")
    example = generated(0, 50, of)
    example.hidden_states[3] *= 1000
    example.hidden_states[4] = 0
    store = DiskStore.create(tmp_path / "store", of)
    store.write_batch([example])
    store.close()
    (found,) = DiskStore.open(store.folder).read()
    assert found.hidden_states.dtype is torch.bfloat16
    largest = example.hidden_states.float().abs().amax(dim=(1, 2), keepdim=True)
    error = (found.hidden_states.float() - example.hidden_states.float()).abs()
    assert (error <= largest / 16).all()
    plain = of.model_copy(update={"dtype": "bfloat16"})
    assert of.token_bytes < plain.token_bytes


def test_zstd_makes_a_store_of_zeros_small(tmp_path):
    of = schema()
    example = generated(0, 200, of)
    example.hidden_states.zero_()
    sizes = {}
    for compression in ("none", "zstd"):
        store = DiskStore.create(tmp_path / compression, of, compression=compression)
        store.write_shard(0, [example])
        sizes[compression] = store.shard_path(0).stat().st_size
    assert sizes["zstd"] < sizes["none"] / 4


def test_safetensors_itself_reads_a_shard(filled):
    folder, examples = filled
    tensors = load_file(DiskStore.open(folder).shard_path(0))
    assert torch.equal(
        tensors["hidden_states"], torch.cat([example.hidden_states for example in examples[:2]])
    )


def test_examples_are_views_of_the_file(filled):
    """A reader of a large store keeps none of it in memory of its own."""
    store = DiskStore.open(filled[0])
    path = store.shard_paths()[0]
    example = store[0]
    address = example.hidden_states.data_ptr()
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [row[0].split("-") for row in mapped if row[-1] == str(path.resolve())]
    assert any(int(start, 16) <= address < int(end, 16) for start, end in spans)


@pytest.mark.parametrize(("compression", "most"), [("none", OPEN_SHARDS), ("zstd", 1)])
def test_a_reader_keeps_few_shards_open(tmp_path, compression, most):
    store = DiskStore.create(tmp_path / "s", schema(), compression=compression, shard_tokens=1)
    store.write_batch([generated(i, 2, schema()) for i in range(OPEN_SHARDS + 4)])
    store.close()
    reader = DiskStore.open(store.folder)
    assert len(list(reader.read())) == OPEN_SHARDS + 4
    assert len(reader._open) == most


def test_a_checksum_is_compared_once(filled):
    store = DiskStore.open(filled[0])
    shard = store.shard(store.shard_paths()[0])
    shard.read(0)
    entry = shard.header.entries[0].model_copy(update={"checksum": "another"})
    for verified in (True, False):
        shard.verified[0] = verified
        shard.header = shard.header.model_copy(
            update={"entries": (entry, *shard.header.entries[1:])}
        )
        if verified:
            shard.read(0)
        else:
            with pytest.raises(SpeculatorError, match="checksum of example .* does not match"):
                shard.read(0)


def test_the_same_examples_give_the_same_bytes(tmp_path):
    contents = []
    for name in ("one", "two"):
        store = DiskStore.create(tmp_path / name, schema())
        store.write_shard(0, [generated(0, 5, schema()), Failure("0/1", "too odd")])
        contents.append(store.shard_path(0).read_bytes())
    assert contents[0] == contents[1]


def test_examples_set_aside_are_listed_with_their_reasons(tmp_path):
    store = DiskStore.create(tmp_path / "store", schema())
    store.write_shard(0, [Failure("0/0", "too odd"), generated(1, 4, schema())])
    store.write_shard(1, [Failure("0/2", "odd as well")])
    store.close()
    assert store.set_aside() == {"0/0": "too odd", "0/2": "odd as well"}
    assert [example.key for example in store.read()] == ["0/1"]


def flip(position):
    def edit(content):
        changed = bytearray(content)
        changed[position] ^= 1
        return bytes(changed)

    return edit


DAMAGE = {
    "last byte": (flip(-1), "checksum"),
    "first byte of the data": (flip(-170), "checksum"),
    "cut": (lambda content: content[:-1], ""),
    "cut in the header": (lambda content: content[:40], ""),
    "empty": (lambda content: b"", ""),
    "longer": (lambda content: content + b"x", ""),
    "other text": (lambda content: b"no shard at all" * 9, ""),
    "a header without end": (lambda content: b"\xff" * 8 + content[8:], ""),
    "a key": (lambda content: content.replace(b"0/2", b"0/\xff"), ""),
    "an entry that starts elsewhere": (
        lambda content: content.replace(b'\\"start\\":9', b'\\"start\\":8'),
        "starts at 8",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_shard_is_found_and_named(filled, what):
    folder, examples = filled
    edit, words = DAMAGE[what]
    store = DiskStore.open(folder)
    path = store.shard_path(1)
    content = path.read_bytes()
    path.write_bytes(edit(content))
    assert path.read_bytes() != content
    (found,) = store.find_damage().items()
    assert found[0] == path and words in found[1] and str(path) in found[1]
    with pytest.raises(SpeculatorError, match="damaged"):
        list(DiskStore.open(folder).read())


def test_shards_of_another_place_or_store_are_found(filled, tmp_path):
    folder, _ = filled
    store = DiskStore.open(folder)
    first, second = store.shard_paths()
    shutil.copy(first, second)
    assert "its header states shard 0" in store.find_damage()[second]
    other = DiskStore.create(tmp_path / "other", schema(layer_ids=(1, 3, 4)))
    other.write_shard(0, [generated(0, 5, schema())])
    shutil.copy(other.shard_path(0), first)
    assert "its schema is not the store's" in store.find_damage()[first]


def compressed(content):
    return pa.compress(content, codec="zstd", asbytes=True)


FORGED = {
    "a list": compressed(struct.pack("<Q", 3) + b"[1]"),
    "a number": compressed(struct.pack("<Q", 1) + b"3"),
    "depth": compressed(struct.pack("<Q", 200_000) + b"[" * 200_000),
    "a long header": compressed(struct.pack("<Q", 2**40)),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_compressed_shard_is_one_line(tmp_path, what):
    store = DiskStore.create(tmp_path / "store", schema(), compression="zstd")
    store.shard_path(0).write_bytes(FORGED[what])
    (found,) = store.find_damage().values()
    assert "is damaged" in found


def test_a_compressed_shard_grows_no_further_than_its_header_tells(tmp_path):
    store = DiskStore.create(tmp_path / "store", schema(), compression="zstd")
    store.write_shard(0, [generated(0, 5, schema())])
    path = store.shard_path(0)
    with pa.input_stream(str(path), compression="zstd") as file:
        content = file.read()
    path.write_bytes(compressed(content + bytes(10**6)))
    (found,) = store.find_damage().values()
    assert "bytes its header states" in found


def test_every_flipped_bit_of_a_shard_is_noticed(filled):
    folder, examples = filled
    store = DiskStore.open(folder)
    path = store.shard_path(1)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(flip(position)(content))
        try:
            found = list(DiskStore.open(folder).read())
        except SpeculatorError:
            continue
        # A bit that changes nothing that is read, such as a blank of the header.
        for one, other in zip(found, examples, strict=True):
            assert_same(one, other)


def test_the_index_follows_the_shards(filled):
    folder, examples = filled
    store = DiskStore.open(folder)
    store.write_shard(2, [generated(7, 4, schema())])
    assert len(DiskStore.open(folder)) == len(examples) + 1
    store.shard_path(0).unlink()
    (folder / INDEX).write_bytes(b"no table")
    assert [e.key for e in DiskStore.open(folder).read()] == ["0/2", "0/3", "0/7"]
    assert DiskStore.open(folder)[2].key == "0/7"


def test_a_link_out_of_the_store_is_refused(filled, tmp_path):
    folder, _ = filled
    path = DiskStore.open(folder).shard_path(1)
    outside = tmp_path / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(SpeculatorError, match="is a link to"):
        list(DiskStore.open(folder).read())


def test_a_folder_that_is_no_store_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(SpeculatorError, match="holds other files"):
        DiskStore.create(tmp_path, schema())
    with pytest.raises(SpeculatorError, match="expected a store"):
        DiskStore.open(tmp_path)


def test_a_store_is_gone_on_with_by_the_same_options_alone(filled):
    folder, _ = filled
    with pytest.raises(SpeculatorError, match="already holds a store.*--run.resume"):
        DiskStore.create(folder, schema())
    DiskStore.create(folder, schema(), resume=True)
    with pytest.raises(SpeculatorError, match="dtype 'float32', but it is now 'float16'"):
        DiskStore.create(folder, schema(dtype="float16"), resume=True)
    with pytest.raises(SpeculatorError, match=r"made with data.seed None, but it is now 1"):
        DiskStore.create(folder, schema(), resume=True, made_from={"data": {"seed": 1}})


def test_a_damaged_manifest_is_one_line(filled):
    folder, _ = filled
    content = json.loads((folder / MANIFEST).read_text())
    content["content"]["layer_ids"] = [4, 1]
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(SpeculatorError, match="store.json is damaged: content: layer_ids"):
        DiskStore.open(folder)
    (folder / MANIFEST).write_text(json.dumps(content | {"format": "speculators-data-2"}))
    with pytest.raises(SpeculatorError, match="format: .*speculators-data-1"):
        DiskStore.open(folder)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from speculators_core.data_generation.stores.disk import DiskStore
from tests.data_generation.making import generated, schema
store = DiskStore.create(Path(sys.argv[1]), schema())
store.write_shard(0, [generated(0, 5, schema())])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    store.write_shard(1, [generated(1, 2000, schema())])
except ValueError as error:
    print(error)
"""


def test_where_there_is_no_room_nothing_is_left_half_written(tmp_path):
    folder = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)], capture_output=True, text=True
    )
    assert "000001.safetensors could not be written: File too large" in done.stdout, done.stderr
    assert [path.name for path in (folder / "shards").iterdir()] == ["000000.safetensors"]
    assert read_header(folder / "shards" / "000000.safetensors").num_tokens == 5


def test_a_schema_refuses_tensors_of_other_shapes_and_types():
    of = schema()
    tensors = of.encode(generated(0, 3, of))
    wrong = {
        "missing": {k: v for k, v in tensors.items() if k != "loss_mask"},
        "unknown": tensors | {"more": torch.zeros(3)},
        "dtype": tensors | {"hidden_states": tensors["hidden_states"].half()},
        "shape": tensors | {"hidden_states": tensors["hidden_states"][:, :2]},
        "length": tensors | {"loss_mask": tensors["loss_mask"][:2]},
        "empty": {name: tensor[:0] for name, tensor in tensors.items()},
    }
    for what, given in wrong.items():
        with pytest.raises(SpeculatorError, match="here"):
            of.decode("0/0", 1, given, "here")
            pytest.fail(what)
    with pytest.raises(SpeculatorError, match="num_prompt_tokens is 4, expected 1 to 3"):
        of.decode("0/0", 4, tensors, "here")
    with pytest.raises(SpeculatorError, match="the key has 0 characters"):
        of.decode("", 1, tensors, "here")
