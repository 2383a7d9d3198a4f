import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from benchmarks.acceptance.vllm_engine import speculator_settings
from speculators_core.errors import SpeculatorError
from speculators_core.registry import MODELS
from speculators_vllm.plugin.leftovers import skipping
from speculators_vllm.plugin.speculative_config import Source, check_served, complete
from tests.conftest import make_verifier
from tests.data import INTEROP

EAGLE3 = str(INTEROP / "eagle3")
VERIFIER = str(INTEROP / "verifier")


def completed(given, by_flag=None, verifier=None):
    verifier = verifier or AutoConfig.from_pretrained(VERIFIER)
    return complete(given, by_flag or {}, verifier, VERIFIER)


@pytest.fixture
def copy(tmp_path):
    """A copy of the speculator whose config a test may change."""
    folder = shutil.copytree(EAGLE3, tmp_path / "eagle3")

    def change(edit):
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return change


def test_method_and_tokens_come_from_the_checkpoint():
    assert completed({"model": EAGLE3}) == {
        "model": EAGLE3,
        "method": "eagle3",
        "num_speculative_tokens": 3,
    }


def test_users_own_keys_win():
    settings = completed({"model": EAGLE3, "num-speculative-tokens": 2, "max_model_len": 99})
    assert settings["num_speculative_tokens"] == 2
    assert settings["max_model_len"] == 99


def test_what_a_flag_gives_is_not_added_again():
    settings = completed({}, {"model": EAGLE3, "num_speculative_tokens": 2})
    assert settings == {"method": "eagle3"}


def test_default_proposal_method_decides(copy):
    def edit(config):
        inner = config["speculators_config"]
        inner["proposal_methods"].append({"proposal_type": "sampling", "speculative_tokens": 6})
        inner["default_proposal_method"] = "sampling"

    assert completed({"model": copy(edit)})["num_speculative_tokens"] == 6


@pytest.mark.parametrize("place", ["", "verifier", "proposal_methods"])
def test_keys_of_others_do_not_stop_a_server(copy, place):
    def edit(config):
        inner = config["speculators_config"]
        at = {"": config, "verifier": inner["verifier"]}.get(place, inner["proposal_methods"][0])
        at |= {"max_anchors": 3072, "use_cache": True, "colour": "blue"}

    assert completed({"model": copy(edit)})["num_speculative_tokens"] == 3


@pytest.mark.parametrize(
    "given",
    [
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
        {"method": "draft_model", "model": VERIFIER, "num_speculative_tokens": 3},
        {"method": "custom_class", "model": "package.module.Class"},
        {"model": "s3://bucket/draft"},
        {"model": "some/draft-out-of-reach"},
        {"method": "draft_model", "model": "/nowhere/draft.gguf"},
    ],
)
def test_other_methods_are_left_alone(given):
    assert completed(given) == given


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[1, 3, 7]), "7 is out of range"),
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[1, 3]), "fc.weight has shape"),
        (
            lambda c: c.update(speculators_model_type="eagle9"),
            "unknown .*'eagle9'; known: .*eagle3",
        ),
        (lambda c: c.update(draft_vocab_size=100), "d2t .* is missing|lm_head.weight has shape"),
    ],
)
def test_faulty_checkpoint_is_refused_before_vllm_loads_it(copy, edit, message):
    with pytest.raises(SpeculatorError, match=message) as caught:
        completed({"model": copy(edit)})
    assert "\n" not in str(caught.value)


def test_another_verifier_is_refused():
    with pytest.raises(SpeculatorError, match="hidden size 32; the speculator was made for 128"):
        completed({"model": EAGLE3}, verifier=make_verifier().config)


@pytest.mark.parametrize("tokens", [0, -1, "three"])
def test_tokens_below_one_are_refused(tokens):
    with pytest.raises(SpeculatorError, match="at least 1"):
        completed({"model": EAGLE3, "num_speculative_tokens": tokens})


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(SpeculatorError, match="holds no config.json"):
        completed({"model": str(tmp_path)})
    (tmp_path / "params.json").write_text("{}")
    assert completed({"model": str(tmp_path)}) == {"model": str(tmp_path)}


def test_dummy_weights_are_not_looked_for(copy, tmp_path):
    name = copy(lambda config: None)
    (tmp_path / "eagle3" / "model.safetensors").unlink()
    verifier = AutoConfig.from_pretrained(VERIFIER)
    settings = complete({"model": name}, {}, verifier, VERIFIER, Source(has_weights=False))
    assert settings["num_speculative_tokens"] == 3


def test_a_fault_of_ours_leaves_the_settings_as_they_are(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr("speculators_vllm.plugin.speculative_config.checkpoint.fetch", fail)
    assert completed({"model": EAGLE3}) == {"model": EAGLE3}


def test_missing_folder_is_refused():
    with pytest.raises(SpeculatorError, match="no such folder"):
        completed({"model": "/nowhere/eagle3"})


def test_what_vllm_has_no_method_for_is_refused_by_name(copy, monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS._table, "novel", MODELS._table["mtp"])
    with pytest.raises(SpeculatorError, match="vLLM has no proposer for .*'novel'; known: dflash"):
        completed({"model": copy(lambda c: c.update(speculators_model_type="novel"))})
    folder = shutil.copytree(INTEROP / "dflash", tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sample_from_anchor": True}))
    with pytest.raises(SpeculatorError, match="sample_from_anchor is true, which vLLM 0.32"):
        completed({"model": str(folder)})


def test_another_architecture_is_refused(copy):
    def made_for_llama(config):
        config["speculators_config"]["verifier"]["architectures"] = ["LlamaForCausalLM"]

    with pytest.raises(SpeculatorError, match="is a Qwen3.*was made for LlamaForCausalLM"):
        completed({"model": copy(made_for_llama)})


def test_another_tokenizer_is_refused(copy, tmp_path):
    name = copy(lambda c: c["speculators_config"]["verifier"].update(name_or_path=VERIFIER))
    other = shutil.copytree(VERIFIER, tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    verifier = AutoConfig.from_pretrained(VERIFIER)
    with pytest.raises(SpeculatorError, match="the speculator was trained with .*Pass that tok"):
        complete({"model": name}, {}, verifier, VERIFIER, Source(tokenizer=str(other)))
    (Path(name) / "tokenizer.json").write_text(json.dumps(tokens))  # beside the speculator
    settings = complete({"model": name}, {}, verifier, VERIFIER, Source(tokenizer=str(other)))
    assert settings["num_speculative_tokens"] == 3
    with pytest.raises(SpeculatorError, match="the speculator was trained with .*eagle3"):
        completed({"model": name})
    tokens = json.loads((Path(VERIFIER) / "tokenizer.json").read_text())
    tokens["added_tokens"].append({"id": 2048, "content": "<mask>"})  # no text of the verifier's
    (Path(name) / "tokenizer.json").write_text(json.dumps(tokens))
    assert completed({"model": name}) == {**settings, "model": name}


@pytest.mark.parametrize(
    ("chosen", "is_on"),
    [(None, True), ("speculators", True), ("other,speculators", True), ("", False), ("x", False)],
)
def test_vllm_is_told_what_the_plugin_would_tell_it(monkeypatch, chosen, is_on):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
    name = str(INTEROP / "peagle")
    explicit = {"method": "eagle3", "parallel_drafting": True, "num_speculative_tokens": 4}
    assert speculator_settings(name) == ({"model": name} | ({} if is_on else explicit))


def test_what_vllm_serves_with_the_plugin_alone_is_refused_without_it():
    config = json.loads((INTEROP / "mtp/config.json").read_text())
    check_served("mtp", config)
    with pytest.raises(SpeculatorError, match="vLLM alone serves no mtp speculator; .*PLUGINS"):
        check_served("mtp", config, with_plugin=False)


def test_what_is_not_read_here_is_vllms_to_serve(copy, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("speculators_vllm"), "propagate", True)
    name = copy(
        lambda c: c["speculators_config"]["proposal_methods"].append({"proposal_type": "tree"})
    )
    assert completed({"model": name})["num_speculative_tokens"] == 3
    assert "vLLM serves the draft unchecked." in caplog.text and "'tree'" in caplog.text
    with pytest.raises(SpeculatorError, match="hidden size 32; the speculator was made for 128"):
        name = copy(lambda c: c["speculators_config"]["proposal_methods"].pop())
        completed({"model": name}, verifier=make_verifier().config)


def test_tensors_without_use_are_noted_once(copy, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("speculators_vllm"), "propagate", True)
    file = Path(copy(lambda config: None)) / "model.safetensors"
    save_file(load_file(file) | {"verifier_norm.weight": torch.ones(128)}, file)
    assert completed({"model": str(file.parent)})["num_speculative_tokens"] == 3
    told = {record.getMessage() for record in caplog.records}
    (note,) = [text for text in told if "tensors without use" in text]
    assert note.endswith("which were ignored: verifier_norm.weight")


def test_tensors_without_use_are_hidden_from_vllms_networks():
    names = ["verifier_norm.weight", "verifier_lm_head.weight", "fc.weight", "lm_head.weight"]
    kept = skipping(lambda loader, source: iter((name, None) for name in names))(None, None)
    assert [name for name, _ in kept] == ["fc.weight", "lm_head.weight"]


@pytest.mark.parametrize(("offset", "is_hidden"), [(0, True), (3, False)])
def test_a_vocabulary_map_is_hidden_where_it_maps_nothing(offset, is_hidden):
    stored = {"d2t": torch.tensor([0, 0, offset])}
    kept = dict(skipping(lambda loader, source: iter(stored.items()))(None, None))
    assert ("d2t" not in kept) == is_hidden
