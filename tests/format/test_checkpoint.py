import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators_core.errors import SpeculatorError
from speculators_core.format import checkpoint
from speculators_core.models.speculator import SpeculatorModel


def load(folder):
    return SpeculatorModel.from_pretrained(folder)


def refused(folder, message):
    before = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    with pytest.raises(SpeculatorError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert sorted(path.name for path in folder.iterdir()) == before


def test_missing_folder_is_named(tmp_path):
    refused(tmp_path / "nowhere", "no such folder")


def test_file_in_place_of_folder_is_named(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    with pytest.raises(SpeculatorError, match="is a file"):
        load(file)


def test_folder_without_config_is_named(tmp_path):
    refused(tmp_path, "holds no config.json")


def test_config_that_is_no_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not valid JSON")


def test_verifier_in_place_of_speculator_is_named(verifier_folder):
    refused(verifier_folder, "not a speculator")


def test_missing_weights_are_named(eagle3_folder):
    (eagle3_folder / checkpoint.WEIGHTS).unlink()
    refused(eagle3_folder, "model.safetensors is missing")


def test_truncated_weights_are_named(eagle3_folder):
    file = eagle3_folder / checkpoint.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    refused(eagle3_folder, "truncated")


def change_tensor(folder, name, change):
    file = folder / checkpoint.WEIGHTS
    tensors = load_file(file)
    changed = change(tensors.pop(name, None))
    save_file({**tensors, **({} if changed is None else {name: changed})}, file)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fc.weight", lambda t: None, "tensor fc.weight .* is missing"),
        ("fc.weight", lambda t: t[:, :-1].clone(), "fc.weight has shape"),
        ("fc.weight", lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), "NaN"),
        ("norm.weight", lambda t: t.fill_(float("inf")), "infinity"),
        ("verifier_norm.weight", lambda t: torch.ones(32), "verifier_norm.weight has no place"),
    ],
)
def test_bad_tensor_is_named(eagle3_folder, name, change, message):
    change_tensor(eagle3_folder, name, change)
    refused(eagle3_folder, message)


def test_shards_read_as_one_and_a_missing_one_is_named(eagle3_folder, tmp_path):
    model = load(eagle3_folder)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size=8_000)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    again = load(sharded)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    shards[1].unlink()
    refused(sharded, "is missing")


def test_index_may_not_point_outside_the_folder(eagle3_folder):
    index = {"weight_map": {"fc.weight": "../elsewhere.safetensors"}}
    (eagle3_folder / checkpoint.INDEX).write_text(json.dumps(index))
    refused(eagle3_folder, "expected the name of a file in the same folder")


def test_index_that_names_a_tensor_its_shard_lacks_is_refused(eagle3_folder):
    index = {"weight_map": {"ghost.weight": checkpoint.WEIGHTS}}
    (eagle3_folder / checkpoint.INDEX).write_text(json.dumps(index))
    refused(eagle3_folder, "no tensor ghost.weight")


def test_write_then_read_gives_the_same_bytes(eagle3_folder, tmp_path):
    copy = tmp_path / "copy"
    load(eagle3_folder).save_pretrained(copy)
    for name in (checkpoint.CONFIG, checkpoint.WEIGHTS):
        assert (copy / name).read_bytes() == (eagle3_folder / name).read_bytes()


def test_writing_over_shards_leaves_no_stale_one(eagle3_folder):
    model = load(eagle3_folder)
    (eagle3_folder / "notes.txt").write_text("mine")
    model.save_pretrained(eagle3_folder, max_shard_size=8_000)
    assert not (eagle3_folder / checkpoint.WEIGHTS).exists()
    model.save_pretrained(eagle3_folder)
    names = {path.name for path in eagle3_folder.iterdir()}
    assert names == {checkpoint.CONFIG, checkpoint.WEIGHTS, "notes.txt"}


def test_failed_write_leaves_the_old_checkpoint_whole(eagle3_folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in eagle3_folder.iterdir()}
    model = load(eagle3_folder)
    model.fc.weight.data.zero_()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_torch_state_dict", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(eagle3_folder)
    assert {path.name: path.read_bytes() for path in eagle3_folder.iterdir()} == before


def test_who_may_read_the_config_may_read_the_weights(tmp_path):
    checkpoint.write_checkpoint(tmp_path, {"a": 1}, {"w": torch.zeros(2)})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
