"""Quantized verifiers give states, heads and drafts as plain ones do."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from speculators_core.errors import SpeculatorError
from speculators_core.format.checkpoint import QUANTIZATION_KEYS
from speculators_core.models.mtp import MTPDraftModel
from speculators_core.verifier.pair import Pair
from speculators_core.verifier.quantization import method_of
from speculators_core.verifier.reading import (
    load_verifier,
    read_verifier_config,
    read_verifier_head,
)
from tests.conftest import make_verifier
from tests.quantized import quantization_config, quantize

IDS = torch.arange(3, 25)[None]
KINDS = ("int8", "fp8")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    make_verifier().save_pretrained(tmp_path / "verifier")
    quantize(tmp_path / "verifier", kind)
    return tmp_path / "verifier"


@torch.no_grad()
def states_of(model):
    """As data generation makes them: by the layers alone."""
    return model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state


@torch.no_grad()
def test_states_are_those_of_the_whole_model(folder):
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = whole(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    states = states_of(load_verifier(str(folder), torch.float32))
    assert torch.equal(states, expected)
    assert (states - states_of(make_verifier())).abs().max() > 1e-4  # it is quantized


def test_a_verifier_that_the_user_has_loaded_is_unpacked(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    draft = MTPDraftModel.from_training_args(loaded.config)
    draft.attach_verifier(loaded)
    assert torch.equal(states_of(loaded), states_of(load_verifier(str(folder), torch.float32)))


def test_a_quantized_head_is_read_with_its_scales(kind, tmp_path):
    make_verifier(tie_word_embeddings=False).save_pretrained(tmp_path)
    meant = quantize(tmp_path, kind, head=True)
    head = read_verifier_head(str(tmp_path), torch.float32)
    assert torch.allclose(head.lm_head.weight, meant["lm_head.weight"])


def test_no_draft_inherits_the_quantization(folder, tmp_path):
    config = read_verifier_config(folder)
    assert method_of(config).startswith("compressed-tensors")
    draft = MTPDraftModel.from_training_args(config)
    layer_config = draft.config.transformer_layer_config
    assert not hasattr(layer_config, "quantization_config")
    layer_config.quantization_config = quantization_config("int8")  # as older versions left it
    draft.save_pretrained(tmp_path / "draft")
    written = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert "quantization_config" not in written["transformer_layer_config"]


@pytest.mark.parametrize("key", QUANTIZATION_KEYS)
def test_a_quantization_that_the_tensors_lack_is_refused(key, verifier, verifier_folder, tmp_path):
    draft = MTPDraftModel.from_training_args(verifier.config)
    draft.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["transformer_layer_config"][key] = quantization_config("int8")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpeculatorError, match=f"{key} .compressed-tensors. .*are plain") as error:
        Pair.open(tmp_path, str(verifier_folder))
    assert error.value.cause == "invalid config"
    config["transformer_layer_config"][key] = {"quant_method": "bitsandbytes"}  # at vLLM's start
    (tmp_path / "config.json").write_text(json.dumps(config))
    Pair.open(tmp_path, str(verifier_folder))


def test_a_missing_package_is_named_in_one_line(tmp_path):
    make_verifier().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpeculatorError, match=r"pip install gptqmodel.*Install it") as error:
        load_verifier(str(tmp_path))
    assert "\n" not in str(error.value) and "Copy" not in str(error.value)
