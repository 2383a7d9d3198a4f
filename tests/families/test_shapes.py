"""Sizes of real families: a draft of each algorithm, or one line why there is none."""

import json
import logging

import pytest
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from speculators_core.errors import SpeculatorError, UnreadFormatError
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.models.dflash import DFlashRecipe
from speculators_core.models.eagle3 import Eagle3Recipe
from speculators_core.registry import MODELS
from speculators_core.verifier.mask_token import choose_mask_token
from speculators_core.verifier.sizes import layer_sizes
from tests.data import SHAPES
from tests.families.making import FAMILIES, make_config
from tests.families.test_families import RECIPES

VERIFIERS = json.loads((SHAPES / "verifiers.json").read_text())
LAYERS = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)


def shape_of(name):
    model_type, keys = VERIFIERS[name]
    return CONFIG_MAPPING[model_type](**json.loads(json.dumps(keys)))


def fresh(verifier_config, algorithm, **options):
    of_class = MODELS.load(algorithm)
    recipe = of_class.recipe_class.read({**RECIPES[algorithm], **options}, "test")
    vocab_size = verifier_config.get_text_config().vocab_size
    return of_class.fresh_config(verifier_config, recipe, vocab_size, "org/verifier")


@pytest.mark.parametrize("algorithm", RECIPES)
@pytest.mark.parametrize(
    ("name", "sizes", "guessed"),
    [
        ("pictures with M-RoPE", (32, 8, 128, 12288, 128000), ["rope_parameters"]),
        ("hybrid with partial M-RoPE", (16, 4, 256, 12288, 32768), ["rope_parameters"]),
        (
            "hybrid of experts",
            (16, 2, 256, 6144, 32768),
            ["intermediate_size", "rope_parameters"],
        ),
        (
            "heads that do not divide the width",
            (32, 8, 128, 10944, 131072),
            ["num_attention_heads", "rope_parameters"],
        ),
        ("layers of two head widths", (32, 16, 256, 21504, 131072), []),
        ("state-space hybrid", (32, 8, 128, 21504, 4096), ["rope_parameters"]),
        ("experts with a dense width", (64, 4, 128, 12288, 32768), []),
        ("pictures with plain rope", (32, 8, 128, 32768, 131072), []),
    ],
)
def test_sizes_are_the_verifiers_and_guesses_are_named(name, sizes, guessed, algorithm):
    draft = fresh(shape_of(name), algorithm, aux_layer_ids=(1, 2, 3))
    layer = draft.transformer_layer_config
    assert tuple(getattr(layer, key) for key in LAYERS) == sizes
    assert [guess.split()[0] for guess in draft.guesses] == guessed
    assert layer.rope_parameters.keys() == {"rope_type", "rope_theta"}
    again = SpeculatorModelConfig.from_dict(draft.to_dict())
    assert again.to_dict() == draft.to_dict() and not again.guesses


@pytest.mark.parametrize("name", VERIFIERS)
def test_mtp_says_why_there_is_no_draft(name):
    config = shape_of(name)
    with pytest.raises(SpeculatorError, match="repeats a layer .* Train eagle3, peagle or dflash"):
        MODELS.load("mtp").from_training_args(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_sizes_that_make_layers(model_type):
    config = make_config(model_type)
    layer = fresh(config, "dflash", aux_layer_ids=(1, 2, 3)).transformer_layer_config
    heads, kv = layer.num_attention_heads, layer.num_key_value_heads
    assert layer.hidden_size == 32 and layer.vocab_size == 96
    assert heads % kv == 0 and layer.head_dim % 2 == 0 and 0 < layer.rms_norm_eps < 1e-3


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("gpt2", {}, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "intermediate_size": 128}),
        ("falcon", {}, {"num_key_value_heads": 1, "intermediate_size": 128}),
        ("mamba", {}, {"num_attention_heads": 1, "head_dim": 32, "intermediate_size": 64}),
        ("gpt_neox", {"rope_theta": 7.0}, {"rope_parameters": {"rope_theta": 7.0}}),
        ("phi3", {"rms_norm_eps": 0.25}, {"rms_norm_eps": 0.25}),
        ("stablelm", {"layer_norm_eps": 0.25}, {"rms_norm_eps": 0.25}),
        ("lfm2", {"norm_eps": 0.25}, {"rms_norm_eps": 0.25}),
        ("deepseek_v3", {}, {"num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 4}),
        ("olmoe", {"intermediate_size": 16}, {"intermediate_size": 96}),
        ("gemma3n_text", {}, {"intermediate_size": 64}),
    ],
)
def test_names_of_families_are_known(model_type, keys, expected):
    config = make_config(model_type)
    for key, value in keys.items():
        if key == "rope_theta":
            config.rope_parameters = {"rope_type": "default", "rope_theta": value}
        else:
            setattr(config, key, value)
    found = layer_sizes(config.get_text_config(), {}).values
    for key, value in expected.items():
        if key == "rope_parameters":
            assert found[key]["rope_theta"] == value["rope_theta"]
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("recipe", [Eagle3Recipe, DFlashRecipe])
def test_each_size_can_be_set(recipe):
    stated = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "intermediate_size": 7,
        "max_position_embeddings": 99,
        "rms_norm_eps": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3.0},
    }
    found = layer_sizes(shape_of("hybrid of experts").get_text_config(), recipe(**stated).sizes)
    assert {key: found.values[key] for key in stated} == stated
    assert found.guesses == ()


def test_guesses_are_said_once_in_the_log(caplog):
    config = shape_of("hybrid of experts")
    text = config.get_text_config()
    text.vocab_size, text.num_hidden_layers = 96, 8
    with caplog.at_level(logging.INFO):
        MODELS.load("eagle3").from_training_args(config, speculative_tokens=3, num_layers=1)
    (line,) = [record.getMessage() for record in caplog.records if "chosen" in record.getMessage()]
    assert "intermediate_size 6144 (three times its width" in line


@pytest.mark.parametrize(
    "keys",
    [{"num_attention_heads": 3}, {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}],
)
def test_sizes_that_make_no_layer_are_one_line(keys):
    with pytest.raises(SpeculatorError) as caught:
        fresh(shape_of("pictures with plain rope"), "eagle3", **keys)
    assert "\n" not in str(caught.value)


def test_rotary_keys_that_no_draft_follows_are_never_written():
    draft = fresh(shape_of("pictures with plain rope"), "eagle3")
    plain = draft.to_dict()
    keys = {"partial_rotary_factor": 0.5, "mrope_section": [24, 20, 20]}
    draft.transformer_layer_config.rope_parameters |= keys
    assert draft.to_dict() == plain


def test_scaling_is_tried_without_where_a_draft_is_read_otherwise_than_trained():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    rope = {**yarn, "original_max_position_embeddings": 4096}
    draft = fresh(shape_of("pictures with plain rope"), "eagle3", rope_parameters=rope)
    verifier = shape_of("hybrid with partial M-RoPE").get_text_config()
    tried = [
        other.changes["transformer_layer_config"].rope_parameters
        for other in draft.other_readings(verifier)
        if other.cause == "rope"
    ]
    assert tried == [
        {"rope_type": "default", "rope_theta": 1e7},  # the verifier's, for whole heads
        {"rope_type": "default", "rope_theta": 1e4},
    ]


# ---- mask tokens ----


def tokenizer_of(*names, **special):
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=names[0])), **special
    )
    return tokenizer


@pytest.mark.parametrize(
    ("names", "special", "vocab_size", "token_id", "reason"),
    [
        (("a", "b", "[MASK]"), {"mask_token": "[MASK]"}, 3, 2, "the tokenizer's mask"),
        (("a", "<|mask|>", "<unused0>"), {}, 3, 1, "called a mask"),
        (("a", "b", "<unused0>", "<unused1>"), {}, 4, 2, "reserved"),
        (("a", "<|reserved_special_token_7|>"), {}, 9, 1, "reserved"),
        (("a", "[control_8]"), {}, 2, 1, "reserved"),
        (("a", "b"), {}, 8, 2, "the tokenizer does not"),
        (("a", "b", "<x>"), {"additional_special_tokens": ["<x>"]}, 3, 2, "no template writes"),
    ],
)
def test_mask_token_is_one_that_texts_do_not_hold(names, special, vocab_size, token_id, reason):
    chosen = choose_mask_token(tokenizer_of(*names, **special), vocab_size)
    assert chosen.token_id == token_id and reason in chosen.reason


def test_mask_token_is_missing_where_every_token_is_for_texts():
    with pytest.raises(SpeculatorError, match="Set it to a token that texts do not hold"):
        choose_mask_token(tokenizer_of("a", "b", "<e>", eos_token="<e>"), 3)


@pytest.mark.parametrize("algorithm", ["peagle", "dflash"])
def test_fresh_draft_takes_a_mask_token_from_the_tokenizer(algorithm, tmp_path):
    tokenizer_of("a", "b", "<|mask|>").save_pretrained(tmp_path)
    config = make_config("llama")
    recipe = {**RECIPES[algorithm], "mask_token_id": None}
    recipe["aux_layer_ids"] = (1, 2, 3)
    of_class = MODELS.load(algorithm)
    with pytest.raises(SpeculatorError, match="mask_token_id is missing"):
        of_class.from_training_args(config, **recipe)
    config.name_or_path = str(tmp_path)
    draft = of_class.from_training_args(config, **recipe)
    assert draft.config.mask_token_id == 2
    assert draft.config.guesses[-1] == "mask_token_id 2 ('<|mask|>' is called a mask)"


# ---- configs of published drafts ----


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("dflash-with-mrope", None),
        ("eagle3-with-four-ids", None),
        ("dspark", "DSpark .*public speculators package"),
        ("native-mtp", r"language model .* with MTP layers.*\"method\": \"mtp\""),
        ("authors-dflash", "DFlash in its authors' own format"),
        ("authors-eagle3", "EAGLE-3 in its authors' own format"),
    ],
)
def test_published_configs_are_read_or_named(name, format, tmp_path):
    raw = json.loads((SHAPES / "drafts" / f"{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if format is None:
        config = SpeculatorModelConfig.from_pretrained(tmp_path)
        assert SpeculatorModelConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
        return
    for read in (
        lambda: SpeculatorModelConfig.from_pretrained(tmp_path),
        lambda: SpeculatorModelConfig.from_dict(raw),
    ):
        with pytest.raises(UnreadFormatError, match=format) as caught:
            read()
        assert "\n" not in str(caught.value) and caught.value.cause is None
