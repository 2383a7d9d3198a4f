"""Document A: speculators.model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3Model

from speculators_core import (
    Eagle3DraftModel,
    SpeculatorError,
    SpeculatorModel,
    SpeculatorModelConfig,
)
from tests.conftest import make_draft, make_verifier
from tests.documented.rows import proves

PROMPT = torch.tensor([[5, 6, 7]])


# ---- loading ----


@proves("verifier=None attaches the verifier of the config")
def default_verifier(eagle3_folder, caplog, tmp_path):
    model = SpeculatorModel.from_pretrained(eagle3_folder)
    assert model.generate(PROMPT, max_new_tokens=4).shape == (1, 7)
    detached = SpeculatorModel.from_pretrained(eagle3_folder, verifier_attachment_mode="detached")
    assert detached.attached is None and not caplog.records
    config = json.loads((eagle3_folder / "config.json").read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = str(tmp_path / "gone")
    (eagle3_folder / "config.json").write_text(json.dumps(config))
    alone = SpeculatorModel.from_pretrained(eagle3_folder)
    assert alone.attached is None
    (record,) = caplog.records
    assert "loaded without its verifier" in record.message and "gone" in record.message
    with pytest.raises(SpeculatorError, match="gone"):
        SpeculatorModel.from_pretrained(eagle3_folder, verifier_attachment_mode="full")


@proves("from_pretrained(None, config=, state_dict=)")
def state_dict(eagle3_folder):
    config = SpeculatorModelConfig.from_pretrained(eagle3_folder)
    tensors = load_file(eagle3_folder / "model.safetensors")
    model = SpeculatorModel.from_pretrained(None, config=config, state_dict=tensors)
    assert type(model) is Eagle3DraftModel
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    with pytest.raises(SpeculatorError, match="nothing to load"):
        SpeculatorModel.from_pretrained(None)
    with pytest.raises(SpeculatorError, match="pass a folder or state_dict"):
        SpeculatorModel.from_pretrained(None, config=config)


@proves("from_pretrained(*model_args)")
def positional(eagle3_folder, verifier):
    model = SpeculatorModel.from_pretrained(eagle3_folder, verifier, "full")
    assert model.verifier is verifier
    assert SpeculatorModel.from_pretrained(eagle3_folder, None, "detached").attached is None
    with pytest.raises(SpeculatorError, match="once each"):
        SpeculatorModel.from_pretrained(eagle3_folder, verifier, "full", 3)


@proves("from_pretrained(config=<path>)")
def config_path(eagle3_folder, tmp_path):
    other = tmp_path / "other.json"
    written = json.loads((eagle3_folder / "config.json").read_text())
    other.write_text(json.dumps(written | {"norm_output": not written["norm_output"]}))
    for place in (eagle3_folder, eagle3_folder / "config.json"):
        assert SpeculatorModel.from_pretrained(None, config=place).config.norm_output
        assert SpeculatorModel.from_pretrained(eagle3_folder, config=place).config.norm_output
    assert not SpeculatorModel.from_pretrained(eagle3_folder, config=str(other)).config.norm_output
    with pytest.raises(TypeError, match="Qwen3Config; expected a SpeculatorModelConfig"):
        SpeculatorModel.from_pretrained(eagle3_folder, config=make_verifier().config)


@proves("from_pretrained(ignore_mismatched_sizes=)")
def mismatched(eagle3_folder, caplog):
    tensors = load_file(eagle3_folder / "model.safetensors")
    tensors["norm.weight"] = torch.ones(7)
    with pytest.raises(SpeculatorError, match=r"norm.weight has shape \[7\]"):
        SpeculatorModel.from_pretrained(
            eagle3_folder, state_dict=tensors, ignore_mismatched_sizes=False
        )
    model, info = SpeculatorModel.from_pretrained(
        eagle3_folder, state_dict=tensors, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert "norm.weight [7] instead of [32]" in caplog.text
    assert info["mismatched_keys"] == {("norm.weight", (7,), (32,))} and not info["missing_keys"]
    assert torch.equal(model.fc.weight, tensors["fc.weight"])
    assert model.generate(PROMPT, max_new_tokens=4).shape == (1, 7)


@proves("from_pretrained(use_safetensors=)", "from_pretrained(weights_only=)")
def safe_files(eagle3_folder):
    for value in (None, True):
        SpeculatorModel.from_pretrained(eagle3_folder, use_safetensors=value, weights_only=True)
    for change in ({"use_safetensors": False}, {"weights_only": False}):
        with pytest.raises(SpeculatorError, match=f"{next(iter(change))}=False.*never read here"):
            SpeculatorModel.from_pretrained(eagle3_folder, **change)


@proves("from_pretrained(**kwargs of Transformers)")
def options(eagle3_folder):
    model, info = SpeculatorModel.from_pretrained(
        eagle3_folder,
        device_map="auto",
        torch_dtype=torch.bfloat16,
        attn_implementation="eager",
        low_cpu_mem_usage=True,
        output_loading_info=True,
        norm_output=False,
    )
    assert model.dtype == torch.bfloat16 and not model.config.norm_output
    assert model.verifier.config._attn_implementation == "eager"
    assert model.device == model.verifier.device
    assert info == {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    whole = SpeculatorModel.from_pretrained(eagle3_folder, device_map={"": "cpu"})
    assert whole.device.type == "cpu"
    for change, message in {
        ("device_map", "disk"): "'disk' is not a device",
        ("attn_implementation", "nothing"): "attn_implementation 'nothing'",
        ("norm_outputs", True): "'norm_outputs' has no effect",
    }.items():
        with pytest.raises(SpeculatorError, match=message):
            SpeculatorModel.from_pretrained(eagle3_folder, **dict([change]))
    with pytest.raises(SpeculatorError, match="contradicts"):
        SpeculatorModel.from_pretrained(eagle3_folder, torch_dtype="float16", dtype="bfloat16")
    with pytest.raises(SpeculatorError, match="divides the draft"):
        SpeculatorModel.from_pretrained(eagle3_folder, device_map={"fc": "cpu", "norm": "cuda"})


# ---- the verifier ----


@proves("attach_verifier(AutoModel)")
def stack_without_head(eagle3_folder, verifier_folder, tmp_path):
    stack = AutoModel.from_pretrained(verifier_folder)
    assert type(stack) is Qwen3Model
    speculator = SpeculatorModel.from_pretrained(eagle3_folder, verifier_attachment_mode="detached")
    speculator.attach_verifier(stack)
    alone = AutoModelForCausalLM.from_pretrained(verifier_folder)
    expected = alone.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert torch.equal(speculator.generate(PROMPT, max_new_tokens=12), expected)

    tied = make_verifier(tie_word_embeddings=True)
    draft = make_draft("eagle3", tied)
    draft.attach_verifier(tied.model)
    expected = tied.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert torch.equal(draft.generate(PROMPT, max_new_tokens=12), expected)

    nowhere = Qwen3Model(make_verifier().config)
    with pytest.raises(SpeculatorError, match="has no head, and its checkpoint gave none.*AutoMod"):
        speculator.attach_verifier(nowhere)


@proves("attach_verifier(mode=None)", "attach_verifier returns the model")
def attached(verifier, verifier_folder):
    draft = make_draft("mtp", verifier)
    draft.detach_verifier()
    assert draft.attach_verifier(verifier, mode=None) is verifier
    assert draft.verifier is verifier
    loaded = draft.attach_verifier(str(verifier_folder))
    assert type(loaded) is Qwen3ForCausalLM and draft.verifier is loaded
    parts = draft.attach_verifier(verifier_folder, "train_only")
    assert parts is draft.verifier_head


@proves("resolve_verifier")
def resolved(eagle3_folder, verifier, verifier_folder):
    draft = SpeculatorModel.from_pretrained(eagle3_folder, verifier_attachment_mode="detached")
    assert type(draft.resolve_verifier()) is Qwen3ForCausalLM
    assert type(draft.resolve_verifier(str(verifier_folder))) is Qwen3ForCausalLM
    assert draft.resolve_verifier(verifier) is verifier and draft.attached is None
    draft.attach_verifier(verifier)
    assert draft.resolve_verifier(verifier_folder) is verifier
    with pytest.raises(SpeculatorError, match="hidden size 16"):
        make_draft("mtp", verifier).attach_verifier(make_verifier(hidden_size=16))
