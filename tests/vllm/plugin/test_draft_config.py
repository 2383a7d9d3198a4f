"""vLLM's config of each algorithm's draft, without an engine."""

import json
import pickle

import pytest

from speculators_core.errors import SpeculatorError
from speculators_vllm.plugin.draft_config import DraftConfig, proposer_of
from speculators_vllm.plugin.proposers import PROPOSERS
from tests.data import INTEROP

ALGORITHMS = ("eagle3", "peagle", "dflash", "mtp")


def config_of(name, layer=None, **changes):
    """``config.json`` of a speculator, some of its keys changed; None removes a key."""
    config = json.loads((INTEROP / name / "config.json").read_text())
    config["transformer_layer_config"] |= layer or {}
    return {key: value for key, value in (config | changes).items() if value is not None}


def draft_of(*args, **changes):
    return DraftConfig.extract_transformers_pre_trained_config(config_of(*args, **changes))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_process_gets_the_config_before_it_loads_plugins(name):
    config = DraftConfig.from_pretrained(INTEROP / name)
    again = pickle.loads(pickle.dumps(config))
    assert type(again) is DraftConfig
    assert again.speculative_method == PROPOSERS.load(name).method
    assert (again.model_type == "mtp") == (name == "mtp")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_key_is_explicit_since_vllm_has_no_class_defaults(name):
    config = config_of(name)
    for key in ("rms_norm_eps", "attention_bias"):
        del config["transformer_layer_config"][key]
    draft = DraftConfig.extract_transformers_pre_trained_config(config)
    assert draft["rms_norm_eps"] == 1e-6 and draft["attention_bias"] is False


def test_the_checkpoint_is_not_changed():
    config = config_of("mtp")
    before = json.dumps(config)
    DraftConfig.extract_transformers_pre_trained_config(config)
    assert json.dumps(config) == before


def test_what_has_no_proposer_is_read_as_vllm_reads_it():
    assert proposer_of({"speculators_model_type": "dspark"}) is None
    assert proposer_of({"speculators_model_type": ["eagle3"]}) is None
    assert proposer_of({}) is None
    with pytest.raises(ValueError, match="Expected one of"):
        draft_of("eagle3", speculators_model_type="nothing")


def test_parallel_drafting_is_a_setting_of_peagle_alone():
    settings = {
        name: DraftConfig.build_vllm_speculative_config(config_of(name)) for name in ALGORITHMS
    }
    assert [name for name in ALGORITHMS if "parallel_drafting" in settings[name]] == ["peagle"]
    assert settings["peagle"]["method"] == "eagle3"


@pytest.mark.parametrize(("ids", "counted"), [([1, 3], 2), ([1, 2, 3], None), ([1], 1)])
@pytest.mark.parametrize("name", ["eagle3", "peagle"])
def test_the_number_of_aux_states_is_stated_where_it_is_not_vllms(name, ids, counted):
    draft = draft_of(name, eagle_aux_hidden_state_layer_ids=ids)
    assert draft.get("num_aux_hidden_states") == counted


def test_defaults_of_the_format_win_over_vllms():
    assert draft_of("eagle3", norm_before_residual=None)["norm_before_residual"] is False
    assert draft_of("peagle", fc_norm=True)["fc_norm"] is True


@pytest.mark.parametrize(
    ("layer", "flag", "causal"),
    [
        ({"layer_types": ["full_attention"] * 2}, False, False),
        ({"layer_types": ["full_attention"] * 2, "is_causal": True}, True, True),
        ({"layer_types": None}, False, False),
    ],
)
def test_dflash_of_full_attention_follows_is_causal_alone(layer, flag, causal):
    layer = {"num_hidden_layers": 2} | layer
    draft = draft_of("dflash", layer, sliding_window_non_causal=flag)
    assert draft["dflash_config"]["causal"] is causal


def test_mtp_sees_all_of_the_text_and_has_one_layer():
    windows = {"sliding_window": 8, "use_sliding_window": True, "num_hidden_layers": 4}
    draft = draft_of("mtp", windows | {"layer_types": ["sliding_attention"] * 4})
    assert draft["sliding_window"] is None and draft["layer_types"] is None
    assert draft["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("name", "layer", "changes", "complaint"),
    [
        ("mtp", {"model_type": "gemma3_text"}, {}, "expected one of qwen3, qwen2, llama"),
        ("dflash", {}, {"sample_from_anchor": True}, "sample_from_anchor is true.*expected false"),
        ("eagle3", {"hidden_size": "wide"}, {}, "transformer_layer_config: "),
    ],
)
def test_what_vllm_cannot_serve_is_refused(name, layer, changes, complaint):
    with pytest.raises(SpeculatorError, match=complaint):
        draft_of(name, layer, **changes)
