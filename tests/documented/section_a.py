"""Document A: speculators.model."""

import json
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    Qwen3ForCausalLM,
    Qwen3Model,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation import MinNewTokensLengthLogitsProcessor

from benchmarks.playground import CHECKPOINTS
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
    weight = tensors["fc.weight"]
    for found, message in {
        weight * torch.nan: "state_dict: fc.weight holds a NaN",
        weight.long(): "state_dict: fc.weight holds torch.int64",
        weight.to("meta"): "holds a tensor without values as fc.weight",
        "fc": "holds 'fc' as fc.weight",
    }.items():
        with pytest.raises(SpeculatorError, match=message):
            SpeculatorModel.from_pretrained(
                None, config=config, state_dict=tensors | {"fc.weight": found}
            )
    with pytest.raises(TypeError, match="state_dict is a list"):
        SpeculatorModel.from_pretrained(None, config=config, state_dict=[weight])


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
    with pytest.raises(TypeError, match="config is a dict; expected a SpeculatorModelConfig"):
        SpeculatorModel.from_pretrained(eagle3_folder, config=written)


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
        ("device_map", "cuda:99"): "'cuda:99' is not on this machine",
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
    alone = type(draft)(draft.config)
    alone.config.verifier.name_or_path = str(verifier_folder)
    alone.load_verifier_weights()
    assert torch.equal(alone.verifier_head.lm_head.weight, verifier.lm_head.weight)


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


# ---- decoding ----


@proves("SpeculatorModel is a GenerationMixin")
def text_generation_pipeline():
    # In bfloat16 near ties of this prompt depend on how many tokens one pass verifies.
    speculator = SpeculatorModel.from_pretrained(CHECKPOINTS / "eagle3", dtype="float32")
    assert speculator.can_generate()
    assert speculator.generation_config is speculator.verifier.generation_config
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "verifier")
    writer = pipeline("text-generation", model=speculator, tokenizer=tokenizer)
    alone = pipeline("text-generation", model=speculator.verifier, tokenizer=tokenizer)
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert writer("def read(", **settings) == alone("def read(", **settings)
    chat = [{"role": "user", "content": "Explain os.path.join."}]
    assert writer(chat, **settings) == alone(chat, **settings)


@proves("generate positional arguments")
def positions(verifier):
    draft = make_draft("eagle3", verifier)
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    expected = verifier.generate(PROMPT, config)
    processors = LogitsProcessorList()
    arguments = (PROMPT, config, processors, StoppingCriteriaList(), None, None, None, None)
    assert torch.equal(draft.generate(*arguments, None, None, None, None), expected)
    allowed = draft.generate(PROMPT, config, None, None, lambda row, ids: [9])
    assert allowed[0, 3:].tolist() == [9] * 6
    processors.append(MinNewTokensLengthLogitsProcessor(3, 6, int(expected[0, 3])))
    assert draft.generate(PROMPT, config, processors)[0, 3] != expected[0, 3]


@proves(
    "generate(synced_gpus=)",
    "generate(assistant_model=)",
    "generate(use_model_defaults=)",
    "generate(custom_generate=)",
)
def neutral_values(verifier):
    draft = make_draft("mtp", verifier)
    expected = verifier.generate(PROMPT, max_new_tokens=6, do_sample=False)
    for neutral in (
        {"synced_gpus": False},
        {"assistant_model": verifier},
        {"use_model_defaults": True},
        {"custom_generate": None},
    ):
        assert torch.equal(draft.generate(PROMPT, max_new_tokens=6, **neutral), expected)
    for refused in (
        {"synced_gpus": True},
        {"use_model_defaults": False},
        {"custom_generate": "somebody/something"},
    ):
        with pytest.raises(SpeculatorError, match=next(iter(refused))):
            draft.generate(PROMPT, max_new_tokens=6, **refused)


@proves("generate(negative_prompt_ids=)", "generate(negative_prompt_attention_mask=)")
def negative_prompts(verifier, caplog):
    draft = make_draft("eagle3", verifier)
    negative = {
        "negative_prompt_ids": torch.tensor([[9, 8, 7]]),
        "negative_prompt_attention_mask": torch.ones(1, 3, dtype=torch.long),
    }
    settings = {"max_new_tokens": 8, "do_sample": False, **negative}
    plain = verifier.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(draft.generate(PROMPT, **settings), plain) and not caplog.records
    steered = verifier.generate(PROMPT, guidance_scale=3.0, **settings)
    assert torch.equal(draft.generate(PROMPT, guidance_scale=3.0, **settings), steered)
    assert not torch.equal(steered, plain) and "without the draft" in caplog.text


# ---- classes ----


def define(name: str = "scripted"):
    """A speculator as a notebook defines it after the documents."""

    class ScriptedConfig(SpeculatorModelConfig):
        speculators_model_type: Literal["scripted"] = "scripted"
        depth: int = 2

    class ScriptedModel(SpeculatorModel):
        config_class = ScriptedConfig

        def __init__(self, config, **kwargs):
            super().__init__(config, **kwargs)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(config.depth))
            self.post_init()

        def forward(self, input_ids):
            return input_ids

        @classmethod
        def from_training_args(cls, verifier_config, **kwargs):
            return cls(ScriptedConfig(depth=kwargs["depth"]))

        @staticmethod
        def get_trainer_kwargs(**kwargs):
            return {"special": True}, {"special": False}

    return ScriptedConfig, ScriptedModel


@proves("SpeculatorModel.register")
def registry(tmp_path):
    config_class, model_class = define()
    assert SpeculatorModel.register("scripted")(model_class) is model_class
    assert SpeculatorModel.registry["scripted"] is model_class
    assert SpeculatorModel.registry["eagle3"] is Eagle3DraftModel
    config = config_class(depth=3)
    assert SpeculatorModel.registered_model_class_from_config(config) is model_class
    for other in (make_verifier().config, SpeculatorModelConfig(speculators_model_type="eagle3")):
        with pytest.raises(TypeError, match="expected a"):
            SpeculatorModel.registered_model_class_from_config(other)
    model_class.from_training_args(None, depth=3).save_pretrained(tmp_path)
    loaded = SpeculatorModel.from_pretrained(tmp_path)
    assert type(loaded) is model_class and len(loaded.layers) == 3
    assert loaded.get_trainer_kwargs()[0] != loaded.get_trainer_kwargs()[1]
    assert loaded(PROMPT) is PROMPT
    with pytest.raises(SpeculatorError, match="Register under another name"):
        SpeculatorModel.register("eagle3")(Eagle3DraftModel)


@proves("SpeculatorModel is abstract")
def abstract():
    with pytest.raises(TypeError, match="abstract"):
        SpeculatorModel(Eagle3DraftModel.config_class())


@proves(
    "verify_training_compatible TypeError",
    "verify_training_compatible ValueError",
    "verify_training_compatible AttributeError",
)
def training_compatible(verifier):
    check = SpeculatorModel.verify_training_compatible
    for name in ("eagle3", "mtp"):
        check(make_draft(name, verifier))
    with pytest.raises(TypeError, match="Qwen3ForCausalLM is not a speculator"):
        check(verifier)
    config_class, model_class = define()
    with pytest.raises(ValueError, match="ScriptedModel is not registered"):
        check(model_class(config_class()))
    SpeculatorModel.register("scripted")(model_class)
    model = model_class(config_class())
    del model.layers
    with pytest.raises(AttributeError, match="ScriptedModel has no attribute layers"):
        check(model)


@proves("SpeculatorModel(**kwargs)")
def keywords():
    config_class, model_class = define()
    assert (
        model_class(config_class(), verifier=None, verifier_attachment_mode=None).attached is None
    )
    with pytest.raises(TypeError, match="foo"):
        model_class(config_class(), foo=1)
