import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from speculators_core.errors import SpeculatorError
from speculators_vllm.hidden_states import read_hidden_states
from speculators_vllm.hidden_states.files import FORMAT, FileWriter, read_file
from tests.vllm.hidden_states.records import assert_same, record


def answer_of(folder, name="a"):
    return {"name": name, "hidden_states_path": str(folder / f"{name}.safetensors")}


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    seen = []

    def watched(source, target):
        seen.append((sorted(p.suffix for p in tmp_path.iterdir()), source.parent == target.parent))
        os.rename(source, target)

    monkeypatch.setattr("speculators_core.files.os.replace", watched)
    states = record()
    FileWriter(tmp_path).write(states)
    assert seen == [([".part"], True)]
    assert_same(read_file(tmp_path / "a.safetensors"), states)
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(OSError):
        FileWriter(tmp_path).write(record(name="b"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}
    with pytest.raises(SpeculatorError, match="cannot be made"):
        FileWriter(tmp_path / "a.safetensors" / "under")


def test_a_file_of_others_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(SpeculatorError, match="was not there after 0.02 s"):
        read_hidden_states({"name": "x", "hidden_states_path": str(path)}, timeout_s=0.02)
    nested = {"name": "n/x", "hidden_states_path": str(tmp_path / "n" / "x.safetensors")}
    with pytest.raises(SpeculatorError, match="was not there after 0.02 s"):
        read_hidden_states(nested, timeout_s=0.02)
    path.write_bytes(b"{}")
    with pytest.raises(SpeculatorError, match="cannot be read"):
        read_file(path)
    save_file({"token_ids": torch.zeros(3)}, path)
    with pytest.raises(SpeculatorError, match=f"has format None, expected {FORMAT}"):
        read_file(path)
    metadata = {"format": FORMAT, "request_id": "r", "name": "n", "num_prompt_tokens": "2"}
    tensors = {"token_ids": torch.arange(3), "hidden_states": torch.zeros(3, 2, 8)}
    save_file(tensors, path, metadata=metadata | {"layer_ids": "[1, 2, 3]"})
    with pytest.raises(SpeculatorError, match="is inconsistent: .* 3 tokens and 3 layers"):
        read_file(path)
    save_file(tensors, path, metadata=metadata | {"layer_ids": "[1, 2]"})
    assert read_file(path).layer_ids == (1, 2)


INCONSISTENT = {
    "token_ids are torch.int32": {"token_ids": torch.arange(3, dtype=torch.int32)},
    r"token_ids are torch.int64 \[3, 1\]": {"token_ids": torch.arange(3)[:, None]},
    "states torch.int64": {"hidden_states": torch.zeros(3, 2, 8, dtype=torch.int64)},
    "for 4 tokens and 2 layers": {"token_ids": torch.arange(4)},
    "for 3 tokens and 1 layers": {"layer_ids": (1,)},
    r"hidden_states are \[3, 16\]": {"hidden_states": torch.zeros(3, 16)},
    "0 prompt tokens of 3": {"num_prompt_tokens": 0},
    "4 prompt tokens of 3": {"num_prompt_tokens": 4},
}


@pytest.mark.parametrize("complaint", INCONSISTENT)
def test_an_inconsistent_file_is_refused(tmp_path, complaint):
    FileWriter(tmp_path).write(replace(record(), **INCONSISTENT[complaint]))
    with pytest.raises(SpeculatorError, match=f"is inconsistent: .*{complaint}"):
        read_hidden_states(answer_of(tmp_path))


def test_a_reader_waits_for_a_file_that_is_still_written(tmp_path):
    states = record(name="nested/a")
    threading.Timer(0.1, FileWriter(tmp_path).write, [states]).start()
    assert_same(read_hidden_states(answer_of(tmp_path, "nested/a"), timeout_s=10), states)


def test_a_reader_learns_why_there_is_no_file(tmp_path):
    writer = FileWriter(tmp_path / "sink")
    writer.report("id", "a", "out of memory")
    for answer, complaint in (
        (None, "it asked for none, or was aborted.*Send kv_transfer_params"),
        ({"error": "n is over 1"}, "got no hidden states: n is over 1"),
        (answer_of(tmp_path / "sink"), "a.safetensors was not written: out of memory"),
        (answer_of(tmp_path / "gone"), "gone is gone"),
        (answer_of(tmp_path / "gone", "nested/a"), "gone is gone"),
    ):
        with pytest.raises(SpeculatorError, match=complaint):
            read_hidden_states(answer, timeout_s=5)


def test_a_folder_that_was_removed_is_not_made_again(tmp_path):
    """Another program may have unmounted it."""
    writer = FileWriter(tmp_path / "sink")
    shutil.rmtree(tmp_path / "sink")
    for name in ("a", "nested/a"):
        with pytest.raises((OSError, SafetensorError)):
            writer.write(record(name=name))
        writer.report("id", name, "no folder")  # fails without an error
    assert not (tmp_path / "sink").exists()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    writer = FileWriter(tmp_path / "sink")
    (tmp_path / "sink" / "link").symlink_to(tmp_path)
    with pytest.raises(SpeculatorError, match="leads out of .*sink.*Choose a name without links"):
        writer.write(record(name="link/a"))
    writer.report("id", "link/a", "refused")
    assert [path.name for path in tmp_path.iterdir()] == ["sink"]
