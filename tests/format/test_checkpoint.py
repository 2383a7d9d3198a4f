import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators_core.errors import SpeculatorError, UnreadFormatError
from speculators_core.format import checkpoint
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.format.foreign import foreign_format
from speculators_core.format.stored_speculator import StoredSpeculator
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
        ("model.norm.weight", lambda t: torch.ones(32), "model.norm.weight has no place"),
        ("layers.0.mlp.gate_up_proj.weight", lambda t: torch.ones(8, 8), "projections as one"),
    ],
)
def test_bad_tensor_is_named(eagle3_folder, name, change, message):
    change_tensor(eagle3_folder, name, change)
    refused(eagle3_folder, message)


LEFT_OVER = {
    "verifier_norm.weight": torch.ones(32),
    "verifier_lm_head.weight": torch.full((96, 32), float("nan")),
    "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "mask_hidden": torch.ones(1, 1, 96),
}
"""Tensors that other writers leave in an EAGLE-3 draft's file."""


def test_tensors_without_use_are_ignored_with_one_note_and_not_written(
    eagle3_folder, tmp_path, caplog
):
    before = load(eagle3_folder).state_dict()
    for name, tensor in LEFT_OVER.items():
        change_tensor(eagle3_folder, name, lambda _, tensor=tensor: tensor)
    caplog.clear()
    model = load(eagle3_folder)
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in LEFT_OVER)
    assert model.state_dict().keys() == before.keys()
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / checkpoint.WEIGHTS).keys() == before.keys()


def test_names_of_the_authors_own_code_are_read(eagle3_folder):
    before = load(eagle3_folder).state_dict()
    file = eagle3_folder / checkpoint.WEIGHTS
    tensors = {k.replace("layers.0.", "midlayer."): v for k, v in load_file(file).items()}
    assert any(name.startswith("midlayer.") for name in tensors)
    save_file(tensors, file)
    for name, tensor in load(eagle3_folder).state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_one_tensor_under_two_names_is_refused(eagle3_folder):
    file = eagle3_folder / checkpoint.WEIGHTS
    tensors = load_file(file)
    tensors["midlayer.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"] + 1
    save_file(tensors, file)
    both = r"midlayer\.mlp\.up_proj\.weight and layers\.0\.mlp\.up_proj\.weight are two names"
    with pytest.raises(SpeculatorError, match=both):
        load(eagle3_folder)


def test_one_shard_needs_no_index(eagle3_folder):
    (eagle3_folder / checkpoint.WEIGHTS).rename(eagle3_folder / "model-00001-of-00001.safetensors")
    load(eagle3_folder)


def test_a_form_that_vllm_alone_reads_is_not_called_damaged(eagle3_folder):
    tensors = load_file(eagle3_folder / checkpoint.WEIGHTS)
    name = "layers.0.mlp.up_proj.weight"
    quantized = {**tensors, name: tensors[name].to(torch.int8), f"{name}_scale": torch.ones(1)}
    save_file(quantized, eagle3_folder / checkpoint.WEIGHTS)
    refused(eagle3_folder, "up_proj.weight_scale has no place")
    config = json.loads((eagle3_folder / "config.json").read_text())
    config["transformer_layer_config"]["quantization_config"] = {"quant_method": "fp8"}
    (eagle3_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnreadFormatError, match="quantized .*quantization_config, fp8"):
        load(eagle3_folder)
    (eagle3_folder / checkpoint.WEIGHTS).unlink()
    torch.save(tensors, eagle3_folder / "pytorch_model.bin")
    with pytest.raises(UnreadFormatError, match="pickled .pytorch_model.bin.") as caught:
        load(eagle3_folder)
    assert caught.value.cause is None


def test_a_model_type_that_hides_the_draft_is_named_and_not_written_again(eagle3_folder, tmp_path):
    path = eagle3_folder / checkpoint.CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(SpeculatorError, match="model_type 'llama' hides") as error:
        StoredSpeculator.open(eagle3_folder).check_tensors()
    assert error.value.cause == "invalid config"
    load(eagle3_folder).save_pretrained(tmp_path / "saved")
    assert "model_type" not in json.loads((tmp_path / "saved" / checkpoint.CONFIG).read_text())


def test_a_config_that_is_passed_stays_as_it_is(eagle3_folder, tmp_path):
    config = SpeculatorModelConfig.from_pretrained(eagle3_folder)
    before = (config.name_or_path, config.dtype)
    other = shutil.copytree(eagle3_folder, tmp_path / "other")
    model = SpeculatorModel.from_pretrained(
        other, config=config, dtype="float16", verifier_attachment_mode="detached"
    )
    model.save_pretrained(tmp_path / "saved")
    assert (config.name_or_path, config.dtype) == before


def test_layers_without_a_type_are_what_their_tensors_are(eagle3_folder):
    kind = load(eagle3_folder).config.transformer_layer_config.model_type
    config = json.loads((eagle3_folder / "config.json").read_text())
    assert config["transformer_layer_config"].pop("model_type") == kind == "llama"
    (eagle3_folder / "config.json").write_text(json.dumps(config))
    assert load(eagle3_folder).config.transformer_layer_config.model_type == "llama"


def test_more_aux_layer_ids_than_fc_reads_are_named(eagle3_folder):
    config = json.loads((eagle3_folder / "config.json").read_text())
    config["eagle_aux_hidden_state_layer_ids"] = [0, 1, 2, 3]
    config["transformer_layer_config"].pop("num_aux_hidden_states", None)
    (eagle3_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpeculatorError, match="for 3 aux hidden states, but .* 4 aux") as caught:
        load(eagle3_folder)
    assert caught.value.cause == "wrong layer ids"


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


def test_a_draft_in_its_authors_format_is_named_with_how_vllm_serves_it(tmp_path):
    layer = {"model_type": "llama", "hidden_size": 32, "draft_vocab_size": 96}
    raw = {**layer, "architectures": ["LlamaForCausalLMEagle3"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnreadFormatError, match='EAGLE-3 in .*"method": "eagle3"') as caught:
        load(tmp_path)
    assert caught.value.cause is None
    assert f'"model": "{tmp_path}"' in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "method", "num_tokens"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "eagle3", 3),
        ({"draft_vocab_size": 32000}, "eagle3", 3),
        ({"architectures": ["EagleLlamaModel"]}, "eagle", 3),
        ({"architectures": ["DFlashDraftModel"], "block_size": 16}, "dflash", 15),
        ({"architectures": ["Qwen3DSparkModel"], "block_size": 8}, "dspark", 7),
        ({"model_type": "medusa"}, "medusa", 3),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, None, 0),
        ({"architectures": ["DFlashDraftModel"], "speculators_model_type": "dflash"}, None, 0),
    ],
)
def test_formats_of_authors_are_recognised(raw, method, num_tokens):
    found = foreign_format(raw)
    assert (found and (found.method, found.num_tokens)) == (method and (method, num_tokens))
