import json
from typing import ClassVar

import pytest
from transformers import LlamaConfig

from speculators_core.errors import SpeculatorError, UnreadFormatError
from speculators_core.format.config import (
    SpeculatorModelConfig,
    SpeculatorsConfig,
    VerifierConfig,
    own_fields,
    reload_and_populate_models,
)
from speculators_core.format.proposals import (
    GreedyTokenProposalConfig,
    SamplingTokenProposalConfig,
    TokenProposalConfig,
)
from speculators_core.models.eagle3 import Eagle3SpeculatorConfig
from tests.conftest import make_verifier
from tests.data import INTEROP


def interop_config() -> dict:
    return json.loads((INTEROP / "eagle3" / "config.json").read_text())


def test_class_is_picked_by_speculators_model_type():
    config = SpeculatorModelConfig.from_dict(interop_config())
    assert type(config) is Eagle3SpeculatorConfig
    assert isinstance(config.transformer_layer_config, LlamaConfig)
    assert config.proposal == GreedyTokenProposalConfig(speculative_tokens=3)


def test_written_config_means_what_was_read(tmp_path):
    read = interop_config()
    SpeculatorModelConfig.from_dict(read).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for informational in ("speculators_version", "transformers_version"):
        read.pop(informational), written.pop(informational)
    assert written == read
    assert "model_type" not in written and "auto_map" not in written


def test_variable_of_the_class_is_no_key():
    class Config(Eagle3SpeculatorConfig):
        is_known: ClassVar[bool] = True

    assert own_fields(Config) == own_fields(Eagle3SpeculatorConfig)


def test_configs_are_equal_by_value():
    one, other = (SpeculatorModelConfig.from_dict(interop_config()) for _ in range(2))
    assert one == other
    other.norm_before_fc = True
    assert one != other


def with_keys_of_others():
    config = interop_config()
    config |= {"max_anchors": 3072, "use_cache": True, "norm_befor_fc": True, "colour": {"a": 1}}
    config["speculators_config"]["build"] = 7
    config["speculators_config"]["verifier"]["hidden_size"] = 128
    config["speculators_config"]["proposal_methods"][0]["tokens"] = 3
    return config


def test_keys_of_a_file_that_nobody_reads_are_kept_with_one_warning(caplog):
    read = SpeculatorModelConfig.from_dict(with_keys_of_others())
    (record,) = caplog.records
    for word in (
        "norm_befor_fc (Did you mean 'norm_before_fc'?)",
        "colour",
        "speculators_config.build",
        "speculators_config.verifier.hidden_size",
        "speculators_config.proposal_methods.tokens",
    ):
        assert word in record.getMessage()
    assert "max_anchors" not in record.getMessage()
    written = read.to_dict()
    assert written["colour"] == {"a": 1} and written["max_anchors"] == 3072
    assert written["speculators_config"]["build"] == 7
    assert written["speculators_config"]["verifier"]["hidden_size"] == 128
    assert written["speculators_config"]["proposal_methods"][0]["tokens"] == 3
    assert SpeculatorModelConfig.from_dict(written).to_dict() == written
    assert read.norm_before_fc == interop_config()["norm_before_fc"]


def test_known_keys_of_others_need_no_warning(caplog):
    SpeculatorModelConfig.from_dict({**interop_config(), "max_anchors": 1, "num_depths": 8})
    assert not caplog.records


@pytest.mark.parametrize("key", ["norm_befor_fc", "max_anchors", "colour"])
def test_a_keyword_without_effect_is_an_error(key):
    with pytest.raises(SpeculatorError, match=f"unknown key '{key}'"):
        Eagle3SpeculatorConfig(**{key: True})
    with pytest.raises(SpeculatorError, match=f"'{key}' has no effect"):
        SpeculatorModelConfig.from_dict(interop_config(), **{key: True})
    config, unused = SpeculatorModelConfig.from_dict(
        interop_config(), **{key: True}, return_unused_kwargs=True
    )
    assert unused == {key: True} and not config.unread_keys


def test_keywords_replace_keys_and_may_name_the_algorithm():
    stored = interop_config()
    kind = stored.pop("speculators_model_type")
    config = SpeculatorModelConfig.from_dict(
        stored, speculators_model_type=kind, norm_before_fc=True
    )
    assert config.speculators_model_type == kind and config.norm_before_fc


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speculators_model_type": "eagle9"}, "known: dflash, eagle3, mtp, peagle"),
        ({"speculators_model_type": None}, "known: dflash, eagle3, mtp, peagle"),
        ({"draft_vocab_size": 0}, "draft_vocab_size"),
        ({"dtype": "float3"}, "dtype 'float3'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"draft_vocab_size": 9999}, "expected at most 2048, the verifier's vocabulary"),
        ({"norm_before_fc": True, "fc_norm": True}, "exclude each other"),
        ({"eagle_aux_hidden_state_layer_ids": [-1, 1, 4]}, "greater than or equal to 0"),
    ],
)
def test_bad_key_is_named_in_one_line(change, message):
    with pytest.raises(SpeculatorError, match=message) as caught:
        SpeculatorModelConfig.from_dict({**interop_config(), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hiden_size", 128, "Did you mean 'hidden_size'"),
        ("model_type", "nope", "'nope' is not in Transformers"),
        ("model_type", "gemma3_text", "has no draft layers"),
        ("hidden_size", "128", "hidden_size"),
        ("num_aux_hidden_states", 5, "num_aux_hidden_states is 5, but there are 3"),
    ],
)
def test_bad_layer_config_is_named(key, value, message):
    config = interop_config()
    layer = config["transformer_layer_config"]
    if key == "hiden_size":
        layer.pop("hidden_size")
    layer[key] = value
    with pytest.raises(SpeculatorError, match=message):
        SpeculatorModelConfig.from_dict(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("default_proposal_method",), "magic", "expected one of greedy"),
        (("proposal_methods",), [], "proposal_methods"),
        (("proposal_methods", 0, "speculative_tokens"), 0, "greater than or equal to 1"),
        (("proposal_methods", 0, "proposal_type"), "magic", "known: greedy, sampling"),
        (("algorithm",), "mtp", "contradicts speculators_model_type 'eagle3'"),
    ],
)
def test_bad_speculators_config_is_named(path, value, message):
    config = interop_config()
    at = config["speculators_config"]
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(SpeculatorError, match=message):
        SpeculatorModelConfig.from_dict(config)


@pytest.mark.parametrize(
    ("change", "written"),
    [
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
        (
            {"eagle_aux_hidden_state_layer_ids": [4, 1, 3, 1]},
            {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
        ),
    ],
)
def test_another_spelling_on_disk_is_read_with_a_warning_and_written_as_the_format_has_it(
    change, written, caplog
):
    config = SpeculatorModelConfig.from_dict({**interop_config(), **change})
    assert config.to_dict() | written == config.to_dict()
    assert len(caplog.records) == 1
    with pytest.raises(SpeculatorError, match="tie_word_embeddings|ascending"):
        SpeculatorModelConfig.from_dict(interop_config(), **change)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("norm_before_fc",), 0),
        (("fc_norm",), None),
        (("tie_word_embeddings",), None),
        (("dtype",), "torch.bfloat16"),
        (("speculators_config", "algorithm"), ...),
        (("speculators_config", "default_proposal_method"), ...),
        (("speculators_config", "default_proposal_method"), None),
        (("speculators_config", "proposal_methods", 0, "proposal_type"), ...),
        (("speculators_config", "proposal_methods", 0, "verifier_accept_k"), None),
        (("transformer_layer_config", "head_dim"), ...),
        (("transformer_layer_config", "head_dim"), None),
        (("transformer_layer_config", "mlp_bias"), None),
        (("transformer_layer_config", "attention_dropout"), 0),
        (("transformer_layer_config", "max_position_embeddings"), 2048.0),
        (
            ("transformer_layer_config", "rope_parameters"),
            {"full_attention": {"rope_theta": 10000.0, "rope_type": "default"}},
        ),
    ],
)
def test_what_vllm_reads_alike_is_read_alike_without_a_warning(path, value, caplog):
    stored, at = interop_config(), interop_config()
    expected = SpeculatorModelConfig.from_dict(stored).to_dict()
    changed = at
    for step in path[:-1]:
        at = at[step]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    assert SpeculatorModelConfig.from_dict(changed).to_dict() == expected
    assert not caplog.records


def test_no_aux_layer_ids_are_the_readers_default():
    change = {"eagle_aux_hidden_state_layer_ids": []}
    config = SpeculatorModelConfig.from_dict({**interop_config(), **change})
    assert config.stated_layer_ids is None


def test_a_key_of_the_layer_config_that_nobody_reads_is_kept_with_a_warning(caplog):
    stored = interop_config()
    stored["transformer_layer_config"]["attention_bia"] = True
    config = SpeculatorModelConfig.from_dict(stored)
    assert "transformer_layer_config.attention_bia (Did you mean 'attention_bias'?)" in caplog.text
    assert config.to_dict()["transformer_layer_config"]["attention_bia"]


def test_an_unknown_proposal_is_not_called_a_fault():
    stored = interop_config()
    stored["speculators_config"]["proposal_methods"][0]["proposal_type"] = "tree"
    with pytest.raises(UnreadFormatError, match="unknown proposal_type 'tree'") as caught:
        SpeculatorModelConfig.from_dict(stored)
    assert caught.value.cause is None


def test_dict_without_type_is_refused():
    with pytest.raises(SpeculatorError, match="not a speculator"):
        SpeculatorModelConfig.from_dict({"model_type": "llama"})


def test_foreign_keys_of_other_writers_are_dropped():
    config = {**interop_config(), "auto_map": {"": "config.X"}, "has_no_defaults_at_init": False}
    assert "auto_map" not in SpeculatorModelConfig.from_dict(config).to_dict()


def test_draft_vocabulary_of_null_is_the_verifiers():
    config = SpeculatorModelConfig.from_dict({**interop_config(), "draft_vocab_size": None})
    assert config.draft_vocab_size == 2048


def test_keyword_replaces_key_and_the_rest_comes_back():
    config, unused = SpeculatorModelConfig.from_dict(
        interop_config(), norm_output=True, other=1, return_unused_kwargs=True
    )
    assert config.norm_output and unused == {"other": 1}


def test_config_of_another_class_is_refused():
    class Other(Eagle3SpeculatorConfig):
        pass

    with pytest.raises(SpeculatorError, match="Eagle3SpeculatorConfig"):
        Other.from_dict(interop_config())


def test_default_proposal_is_the_named_one():
    config = SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[
            GreedyTokenProposalConfig(speculative_tokens=2),
            SamplingTokenProposalConfig(speculative_tokens=7, temperature=0.5),
        ],
        default_proposal_method="sampling",
        verifier=VerifierConfig(name_or_path="x"),
    )
    assert config.default_proposal.speculative_tokens == 7
    assert SpeculatorsConfig.model_validate(config.model_dump()) == config
    assert config.model_dump()["proposal_methods"][1]["temperature"] == 0.5


def test_proposal_class_is_picked_by_type():
    assert isinstance(
        TokenProposalConfig.model_validate({"proposal_type": "sampling"}),
        SamplingTokenProposalConfig,
    )


def test_verifier_config_from_config():
    verifier = make_verifier()
    verifier.config.name_or_path = "there"
    verifier.config.architectures = ["Qwen3ForCausalLM"]
    assert VerifierConfig.from_config(verifier.config) == VerifierConfig(
        name_or_path="there", architectures=["Qwen3ForCausalLM"]
    )
    assert VerifierConfig.from_config(verifier.config, "here").name_or_path == "here"


def test_every_registered_algorithm_can_be_imported():
    reload_and_populate_models()
