import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks import playground
from speculators_core.errors import SpeculatorError
from speculators_core.format.checkpoint import locate_verifier
from speculators_core.verifier import proof, reading
from speculators_core.verifier.fit import check_verifier
from speculators_core.verifier.head import VerifierHead
from speculators_core.verifier.proof import PROVEN_FAMILIES, check_head
from speculators_core.verifier.reading import (
    language_model_class,
    load_verifier,
    read_generation_config,
    read_tokenizer,
    read_verifier_config,
    read_verifier_head,
)
from speculators_core.verifier.taps import LayerTaps
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
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
COHERE = {key: value for key, value in SHAPE.items() if key != "head_dim"}
GEMMA = SHAPE | {"query_pre_attn_scalar": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
QWEN_TEXT = SHAPE | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LLAMA4_VISION = VISION | {
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
FAMILIES = {
    "llama": ("Llama", LlamaConfig(**SHAPE)),
    "qwen2": ("Qwen2", transformers.Qwen2Config(**SHAPE)),
    "qwen3": ("Qwen3", transformers.Qwen3Config(**SHAPE)),
    "qwen3-tied": ("Qwen3", transformers.Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3-moe": ("Qwen3Moe", transformers.Qwen3MoeConfig(**SHAPE, **MOE)),
    "qwen3-next": (
        "Qwen3Next",
        transformers.Qwen3NextConfig(
            **SHAPE, **MOE, **LINEAR_ATTENTION, shared_expert_intermediate_size=16
        ),
    ),
    "qwen3.5": ("Qwen3_5", transformers.Qwen3_5TextConfig(**SHAPE, **LINEAR_ATTENTION)),
    "mistral": ("Mistral", transformers.MistralConfig(**SHAPE)),
    "gemma2": ("Gemma2", transformers.Gemma2Config(**GEMMA, final_logit_softcapping=8.0)),
    "gemma3": ("Gemma3", transformers.Gemma3TextConfig(**GEMMA)),
    "gemma3-capped": (
        "Gemma3",
        transformers.Gemma3TextConfig(**GEMMA, final_logit_softcapping=8.0),
    ),
    "gpt-oss": (
        "GptOss",
        transformers.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    ),
    "granite": ("Granite", transformers.GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "cohere": ("Cohere", transformers.CohereConfig(**COHERE, logit_scale=0.25)),
    "gemma3-vision": (
        "Gemma3",
        transformers.Gemma3Config(text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=4),
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        transformers.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN_VISION),
    ),
    "qwen3-vl": (
        "Qwen3VL",
        transformers.Qwen3VLConfig(
            text_config=QWEN_TEXT, vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0]}
        ),
    ),
    "qwen3.5-vision": (
        "Qwen3_5",
        transformers.Qwen3_5Config(text_config=SHAPE | LINEAR_ATTENTION, vision_config=QWEN_VISION),
    ),
    "mistral3": (
        "Mistral3",
        transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**SHAPE),
            vision_config=transformers.PixtralVisionConfig(**VISION),
        ),
    ),
    "llava": (
        "Llava",
        transformers.LlavaConfig(
            text_config=LlamaConfig(**SHAPE),
            vision_config=transformers.CLIPVisionConfig(**VISION),
        ),
    ),
    "llama4": (
        "Llama4",
        transformers.Llama4Config(
            text_config=SHAPE | {"num_local_experts": 2, "intermediate_size_mlp": 32},
            vision_config=LLAMA4_VISION,
        ),
    ),
}
TOKENS = torch.arange(14).reshape(2, 7) * 5


def make_family(family, **settings):
    """A tiny verifier whose norms have gains of their own: ones would hide a wrong norm."""
    name, config = FAMILIES[family]
    ending = "ForConditionalGeneration" if hasattr(config, "vision_config") else "ForCausalLM"
    config = type(config).from_dict(config.to_dict())
    for key, value in settings.items():
        setattr(config.get_text_config(), key, value)
    torch.manual_seed(0)
    model = getattr(transformers, name + ending)(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.uniform_(0.25, 1.75)
    return model


def run(model):
    """Its logits, the state after its last layer, and what Transformers calls hidden states."""
    with torch.no_grad(), LayerTaps(model, [0, 1, 2]) as taps:
        output = model(TOKENS, output_hidden_states=True)
    return output.logits, taps, output.hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_verifiers_own_logits(family, tmp_path):
    model = make_family(family)
    expected, taps, hidden_states = run(model)
    for k in (0, 1):
        assert torch.equal(taps.states([k]), hidden_states[k])
    ids = torch.tensor([3, 50, 90])
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for head in (
        VerifierHead(model),
        read_verifier_head(tmp_path / "whole"),
        read_verifier_head(tmp_path / "sharded"),
    ):
        assert (head(taps.states([2])) - expected).abs().max() < 1e-5
        assert (head(taps.states([2]), ids) - expected[..., ids]).abs().max() < 1e-5
        assert torch.equal(head.embed_tokens.weight, model.get_input_embeddings().weight)
    config = read_verifier_config(tmp_path / "whole")
    loaded = language_model_class(config).from_pretrained(tmp_path / "whole")
    assert (run(loaded)[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_live_comparison_and_twin_accept_the_family(family):
    model = make_family(family)
    proof._compare_logits(model)
    proof._check_twin(reading._without_weights(model.config, False))
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    proof._compare_logits(model)


def test_every_proven_family_is_among_the_tested_ones(monkeypatch):
    monkeypatch.setattr(proof, "_compare_logits", lambda model: pytest.fail("was run"))
    made = {type(model).__name__: model for model in map(make_family, FAMILIES)}
    for name in PROVEN_FAMILIES:
        check_head(made[name])


def test_setting_that_the_class_does_not_heed_is_refused(tmp_path):
    model = make_family("gemma3-vision", final_logit_softcapping=8.0)
    message = r"^Gemma3ForConditionalGeneration: its logits .* differ by .* \(bound .*VerifierHead"
    with pytest.raises(SpeculatorError, match=message):
        check_head(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(SpeculatorError, match=message):
        read_verifier_head(tmp_path)


class DoubledLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class LayerAfterNorm(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.adapter = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.model.register_forward_hook(self.adapt)

    def adapt(self, module, args, output):
        output.last_hidden_state = self.adapter(output.last_hidden_state)
        return output


class NeedsLayers(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        assert len(self.model.layers) == 2, "where are my layers?"
        return super().forward(*args, **kwargs)


def register(monkeypatch, base, name=None):
    """A tiny model of this class, whose folders Transformers reads for one test."""

    class OddConfig(LlamaConfig):
        model_type = "odd"

    model_class = type(name or base.__name__, (base,), {"config_class": OddConfig})
    names = transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content
    monkeypatch.setitem(names, "odd", OddConfig)
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content
    monkeypatch.setitem(classes, OddConfig, model_class)
    return model_class(OddConfig(**SHAPE)).eval()


@pytest.mark.parametrize("base", [DoubledLogits, LayerAfterNorm])
@pytest.mark.parametrize("name", [None, "LlamaForCausalLM"])
def test_unknown_steps_after_the_norm_are_refused(base, name, monkeypatch, tmp_path):
    model = register(monkeypatch, base, name)
    message = f"^{name or base.__name__}: its logits .* differ by .* \\(bound "
    with pytest.raises(SpeculatorError, match=message) as caught:
        check_head(model)
    assert "\n" not in str(caught.value)
    model.save_pretrained(tmp_path)
    with pytest.raises(SpeculatorError, match=message):
        read_verifier_head(tmp_path)


def test_class_that_needs_its_layers_is_compared_live_only(monkeypatch, tmp_path):
    model = register(monkeypatch, NeedsLayers)
    model.save_pretrained(tmp_path)
    with pytest.raises(SpeculatorError, match="cannot compare .*where are my layers"):
        read_verifier_head(tmp_path)
    check_head(model)


REMOTE_CODE = """
import os
import shutil
from transformers import LlamaConfig, LlamaForCausalLM

os.environ["REMOTE_CODE_RAN"] = "yes"


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * {factor}
        return output
"""


@pytest.mark.parametrize("factor", [1, 2])
def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(factor, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("REMOTE_CODE_RAN", "no")
    folder = tmp_path / f"odd{factor}"
    model = make_family("llama")
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "odd", "auto_map": classes})
    )
    (folder / "odd.py").write_text(REMOTE_CODE.format(factor=factor))
    with pytest.raises(SpeculatorError, match="trust_remote_code"):
        read_verifier_head(folder)
    assert os.environ["REMOTE_CODE_RAN"] == "no"
    if factor == 1:
        head = read_verifier_head(folder, trust_remote_code=True)
        assert torch.equal(head.lm_head.weight, model.lm_head.weight)
    else:
        with pytest.raises(SpeculatorError, match="OddForCausalLM: its logits"):
            read_verifier_head(folder, trust_remote_code=True)
    assert os.environ["REMOTE_CODE_RAN"] == "yes"


class PlainGain(VerifierHead):
    """Gemma's norm taken for Llama's: a gain of w, where it is 1 + w."""

    def __init__(self, model):
        super().__init__(model)
        gain = self.norm.weight
        self.norm = torch.nn.RMSNorm(gain.shape[0], eps=1e-6)
        self.norm.weight = gain


class NoNorm(VerifierHead):
    def __init__(self, model):
        super().__init__(model)
        self.norm = torch.nn.Identity()


class NoCap(VerifierHead):
    def __init__(self, model):
        super().__init__(model)
        self.soft_cap = None


class NoScale(VerifierHead):
    def __init__(self, model):
        super().__init__(model)
        self.scale = 1.0


class EmbeddingsForHead(VerifierHead):
    def __init__(self, model):
        super().__init__(model)
        self.lm_head = self.embed_tokens


@pytest.mark.parametrize(
    ("family", "mutant"),
    [
        ("gemma2", PlainGain),
        ("gemma3", PlainGain),
        ("gemma3-vision", PlainGain),
        ("qwen3-next", PlainGain),
        ("qwen3.5-vision", PlainGain),
        ("llama", NoNorm),
        ("cohere", NoNorm),
        ("gemma2", NoCap),
        ("gemma3-capped", NoCap),
        ("granite", NoScale),
        ("cohere", NoScale),
        ("qwen3", EmbeddingsForHead),
    ],
)
def test_comparison_finds_a_wrong_step(family, mutant, monkeypatch):
    model = make_family(family)
    expected, taps, _ = run(model)
    assert (mutant(model)(taps.states([2])) - expected).abs().max() > 1e-2
    monkeypatch.setattr(proof, "VerifierHead", mutant)
    with pytest.raises(SpeculatorError, match="differ by"):
        proof._compare_logits(model)
    with pytest.raises(SpeculatorError, match="differ by"):
        proof._check_twin(reading._without_weights(model.config, False))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-vl"])
def test_comparison_finds_taps_that_are_one_layer_early(family):
    model = make_family(family)
    expected, taps, _ = run(model)
    assert (VerifierHead(model)(taps.states([1])) - expected).abs().max() > 1e-2


def test_twin_takes_no_room_for_layers_vocabulary_or_pictures():
    config = AutoConfig.for_model("gemma3")  # of four billion parameters
    twin = reading._without_weights(config, False)
    layers = twin.model.language_model.layers
    proof._check_twin(twin)
    assert all(weight.is_meta for weight in layers.parameters())
    allocated = [weight for weight in twin.parameters() if not weight.is_meta]
    assert sum(weight.numel() for weight in allocated) < 100_000


def test_norm_of_the_pictures_is_not_taken_for_the_texts(tmp_path):
    make_family("qwen3.5-vision").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.language_model.norm.weight"]
    assert "model.visual.merger.norm.weight" in stored
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpeculatorError, match=r"no tensor model\.norm\.weight"):
        read_verifier_head(tmp_path)


def test_tied_table_is_found_under_the_name_of_the_head(tmp_path):
    model = make_family("qwen3-tied")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    head = read_verifier_head(tmp_path)
    assert torch.equal(head.embed_tokens.weight, model.lm_head.weight)


@pytest.mark.parametrize("family", ["qwen3", "qwen3.5-vision", "mistral3"])
def test_head_keeps_the_dtype_of_the_checkpoint(family, tmp_path):
    make_family(family).to(torch.bfloat16).save_pretrained(tmp_path)
    assert read_verifier_head(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert read_verifier_head(tmp_path, torch.float16).norm.weight.dtype == torch.float16


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
        ({"num_hidden_layers": 5}, "number of layers 5; the speculator was made for 4"),
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
    with pytest.raises(SpeculatorError, match="cannot read this verifier") as caught:
        read_verifier_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_speculator_is_named_as_one_where_a_verifier_is_expected(tmp_path):
    (tmp_path / "config.json").write_text('{"speculators_model_type": "eagle3"}')
    with pytest.raises(SpeculatorError, match="that of a speculator, expected a verifier's"):
        read_verifier_config(tmp_path)


@pytest.mark.parametrize("value", ["bfloat61", 16, [], "matmul"])
def test_a_dtype_that_is_none_is_named(verifier_folder, tmp_path, value):
    folder = shutil.copytree(verifier_folder, tmp_path / "verifier")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": value}))
    with pytest.raises(SpeculatorError, match=r"config\.json: dtype is .*expected one such as"):
        read_verifier_config(folder)


def test_a_key_of_a_verifier_with_a_wrong_value_is_named(verifier_folder, tmp_path):
    folder = shutil.copytree(verifier_folder, tmp_path / "verifier")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": []}))
    message = r"config\.json: .*'vocab_size' expected int, got list"
    with pytest.raises(SpeculatorError, match=message):
        read_verifier_config(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_verifier_with_weights_that_are_not_finite_is_refused(verifier_folder, tmp_path, value):
    folder = shutil.copytree(verifier_folder, tmp_path / "verifier")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpeculatorError, match=f"{name} holds a NaN or an infinity"):
        load_verifier(str(folder))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"eos_token_id": "x"}', "eos_token_id is 'x', expected the id of a token"),
        ('{"eos_token_id": [1, [2]]}', r"eos_token_id is \[1, \[2\]\]"),
        ('{"pad_token_id": [1]}', r"pad_token_id is \[1\]"),
    ],
)
def test_a_broken_generation_config_is_named(verifier_folder, tmp_path, text, fault):
    folder = shutil.copytree(verifier_folder, tmp_path / "verifier")
    (folder / "generation_config.json").write_text(text)
    for read in (load_verifier, read_generation_config):
        with pytest.raises(SpeculatorError, match=rf"generation_config\.json.*{fault}"):
            read(str(folder))


@pytest.mark.parametrize("length", ["1", [1], {}])
def test_a_tokenizer_that_does_not_run_is_named(tmp_path, length):
    folder = shutil.copytree(playground.VERIFIER, tmp_path / "verifier")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    stated = json.dumps(config | {"model_max_length": length})
    (folder / "tokenizer_config.json").write_text(stated)
    with pytest.raises(SpeculatorError, match="the tokenizer cannot be loaded"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_a_broken_file_of_a_tokenizer_is_named(file, tmp_path):
    folder = shutil.copytree(playground.VERIFIER, tmp_path / "verifier")
    (folder / file).write_bytes(b"{\x8d")
    with pytest.raises(SpeculatorError, match=rf"{file} (cannot be read|is not valid JSON)"):
        read_tokenizer(folder)


def test_a_model_whose_weights_do_not_all_come_from_its_file_is_refused(verifier_folder, tmp_path):
    folder = shutil.copytree(verifier_folder, tmp_path / "verifier")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpeculatorError, match="1 tensors of a .* are missing .model.norm.weight"):
        load_verifier(str(folder))
