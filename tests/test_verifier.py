import json

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from speculators_core.errors import SpeculatorError
from speculators_core.verifier import (
    LayerTaps,
    VerifierHead,
    check_verifier,
    locate_verifier,
    read_verifier_config,
    read_verifier_head,
)
from tests.conftest import VOCAB_SIZE, make_eagle3, make_verifier

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
}
FAMILIES = {
    "qwen3": lambda: make_verifier(num_layers=2),
    "qwen3-tied": lambda: make_verifier(num_layers=2, tie_word_embeddings=True),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_head_gives_the_verifiers_own_logits(family, max_shard_size, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        model.model.norm.weight.normal_()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    tokens = torch.randint(0, VOCAB_SIZE, (1, 7))
    with torch.no_grad(), LayerTaps(model, [2]) as taps:
        expected = model(tokens).logits
    for head in (VerifierHead(model), read_verifier_head(tmp_path)):
        assert (head(taps.states([2])) - expected).abs().max() < 1e-5
        ids = torch.tensor([3, 50, 90])
        assert (head(taps.states([2]), ids) - expected[..., ids]).abs().max() < 1e-5


def test_layers_are_never_read_for_the_head(tmp_path):
    model = make_verifier()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    ends = {
        index[n] for n in index if "layers." not in n
    }  # files with embeddings, final norm and head
    for shard in set(index.values()) - ends:
        with (tmp_path / shard).open("r+b") as stream:
            stream.seek(-8, 2)
            stream.write(b"\xff" * 8)
    head = read_verifier_head(tmp_path)
    assert torch.equal(head.lm_head.weight, model.lm_head.weight)


def test_taps_are_the_states_between_layers(verifier):
    tokens = torch.randint(0, VOCAB_SIZE, (2, 5))
    with torch.no_grad(), LayerTaps(verifier, [0, 1, 3, 4]) as taps:
        output = verifier(tokens, output_hidden_states=True)
    for k in (0, 1, 3):
        assert torch.equal(taps.states([k]), output.hidden_states[k])
    normed = verifier.model.norm(taps.states([4]))
    assert torch.allclose(normed, output.hidden_states[4], atol=1e-6)
    assert not torch.allclose(taps.states([4]), output.hidden_states[4], atol=1e-2)
    assert taps.states([1, 3]).shape == (2, 5, 64)


def test_taps_leave_no_hook_behind(verifier):
    with LayerTaps(verifier, [0, 4]):
        assert verifier.model.layers[0]._forward_pre_hooks
    assert not verifier.model.layers[0]._forward_pre_hooks
    assert not verifier.model.norm._forward_pre_hooks


def test_relative_verifier_is_meant_from_the_speculators_folder(tmp_path, monkeypatch):
    (tmp_path / "verifier").mkdir()
    (tmp_path / "draft").mkdir()
    monkeypatch.chdir("/")
    located = locate_verifier("../verifier", beside=tmp_path / "draft")
    assert located == str(tmp_path / "verifier")
    assert locate_verifier("org/name", beside=tmp_path / "draft") == "org/name"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 40}, "hidden size 40; the speculator was made for 32"),
        ({"vocab_size": 100}, "vocabulary size 100; the speculator was made for 96"),
        ({"num_layers": 5}, "number of layers 5; the speculator was made for 4"),
    ],
)
def test_another_verifier_is_refused(verifier, other, message):
    config = make_eagle3(verifier).config
    with pytest.raises(SpeculatorError, match=message):
        check_verifier(config, make_verifier(**other).config)


def test_aux_layer_beyond_the_verifier_is_refused(verifier):
    with pytest.raises(SpeculatorError, match="aux layer id 9 is out of range"):
        make_eagle3(verifier, aux_layer_ids=(1, 2, 9))


def test_missing_verifier_is_named(tmp_path):
    with pytest.raises(SpeculatorError, match="no such folder"):
        read_verifier_config(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpeculatorError, match=r"holds no config\.json"):
        read_verifier_config(tmp_path / "empty")


def test_verifier_of_unknown_type_is_named_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nope"}')
    with pytest.raises(SpeculatorError, match="not a verifier") as caught:
        read_verifier_config(tmp_path)
    assert "\n" not in str(caught.value)
