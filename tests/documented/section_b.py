"""Document B: speculators.config."""

import json
from typing import Literal

import pytest
from transformers import PretrainedConfig, Qwen3Config

from speculators_core import (
    DFlashSpeculatorConfig,
    Eagle3SpeculatorConfig,
    GreedyTokenProposalConfig,
    SpeculatorError,
    SpeculatorModelConfig,
    SpeculatorsConfig,
    TokenProposalConfig,
    VerifierConfig,
    reload_and_populate_configs,
    reload_schemas,
)
from tests.documented.rows import proves
from tests.hub import Hub


def make_config(**keys) -> Eagle3SpeculatorConfig:
    return Eagle3SpeculatorConfig(
        transformer_layer_config=Qwen3Config(vocab_size=96, hidden_size=32, num_hidden_layers=1),
        draft_vocab_size=64,
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_config(Qwen3Config(), name_or_path="a/verifier"),
        ),
        **keys,
    )


@proves("configs are pydantic models")
def as_pydantic():
    config = make_config(norm_before_residual=True)
    fields = type(config).model_fields
    assert "norm_before_residual" in fields and "draft_vocab_size" in config.model_fields
    dumped = config.model_dump()
    assert dumped["norm_before_residual"] is True and set(dumped) == set(fields)
    again = SpeculatorModelConfig.model_validate(dumped)
    assert type(again) is Eagle3SpeculatorConfig and again.to_dict() == config.to_dict()
    assert Eagle3SpeculatorConfig.model_validate({"norm_output": True}).norm_output
    assert SpeculatorModelConfig.model_validate(config) is config
    properties = Eagle3SpeculatorConfig.model_json_schema()["properties"]
    assert properties["norm_output"]["type"] == "boolean"
    for change in ({"norm_output": "nope"}, {"draft_vocab_size": -3}):
        with pytest.raises(SpeculatorError, match=next(iter(change))):
            Eagle3SpeculatorConfig.model_validate({**dumped, **change})
        with pytest.raises(SpeculatorError, match=next(iter(change))):
            setattr(config, *next(iter(change.items())))
    with pytest.raises(ValueError, match="expected a mapping"):
        SpeculatorModelConfig.model_validate("eagle3")
    assert config.norm_output is False
    assert json.loads(config.model_dump_json())["draft_vocab_size"] == 64
    copied = config.model_copy(update={"norm_output": True})
    assert copied.norm_output and not config.norm_output
    config.speculators_config.check_default_proposal_method()
    layers = config.serialize_transformer_config(config.transformer_layer_config)
    assert config.validate_transformer_config(layers).hidden_size == 32
    with pytest.raises(SpeculatorError, match="transformer_layer_config: .*-1"):
        config.validate_transformer_config({"model_type": "llama", "hidden_size": -1})


@proves("SpeculatorModelConfig.register")
def registry(tmp_path):
    @SpeculatorModelConfig.register("scripted")
    class ScriptedConfig(SpeculatorModelConfig):
        speculators_model_type: Literal["scripted"] = "scripted"
        depth: int = 2

    registered = ScriptedConfig
    assert SpeculatorModelConfig.registry["scripted"] is registered
    assert SpeculatorModelConfig.registry["dflash"] is DFlashSpeculatorConfig
    registered(depth=5).save_pretrained(tmp_path)
    loaded = SpeculatorModelConfig.from_pretrained(tmp_path)
    assert type(loaded) is registered and loaded.depth == 5
    with pytest.raises(SpeculatorError, match="Register under another name"):
        SpeculatorModelConfig.register("eagle3")(Eagle3SpeculatorConfig)
    with pytest.raises(SpeculatorError, match="cannot be registered as 'other'"):
        SpeculatorModelConfig.register("other")(registered)
    with pytest.raises(SpeculatorError, match="expected a subclass of SpeculatorModelConfig"):
        SpeculatorModelConfig.register("qwen3")(Qwen3Config)

    @TokenProposalConfig.register("drawn")
    class DrawnConfig(TokenProposalConfig):
        proposal_type: Literal["drawn"] = "drawn"

    read = TokenProposalConfig.model_validate({"proposal_type": "drawn"})
    assert type(read) is DrawnConfig


@proves("unknown config keys are kept")
def unknown_keys(caplog, tmp_path):
    written = make_config().to_dict() | {"max_anchor": 7, "use_cache": True}
    written["speculators_config"]["verifier"]["hidden_size"] = 32
    config = SpeculatorModelConfig.from_dict(written)
    assert "max_anchor" in caplog.text
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["max_anchor"] == 7 and stored["use_cache"] is True
    assert stored["speculators_config"]["verifier"]["hidden_size"] == 32


@proves("from_dict(**kwargs)")
def overrides(tmp_path):
    written = make_config().to_dict()
    kind = written.pop("speculators_model_type")
    config = SpeculatorModelConfig.from_dict(
        written, speculators_model_type=kind, norm_output=True, draft_vocab_size=32
    )
    assert (config.norm_output, config.draft_vocab_size) == (True, 32)
    config.save_pretrained(tmp_path)
    assert SpeculatorModelConfig.from_pretrained(tmp_path, norm_output=False).norm_output is False
    with pytest.raises(SpeculatorError, match="norm_outputs.*has no effect.*'norm_output'"):
        SpeculatorModelConfig.from_pretrained(tmp_path, norm_outputs=True)


@proves("NotImplementedError for another config")
def not_a_speculator(verifier_folder):
    with pytest.raises(NotImplementedError, match="this is not a speculator"):
        SpeculatorModelConfig.from_pretrained(verifier_folder)
    with pytest.raises(ValueError, match="speculators_model_type"):
        SpeculatorModelConfig.from_dict({"model_type": "qwen3"})


@proves("to_diff_dict")
def diff_dict():
    config = make_config()
    written = config.to_diff_dict()
    assert set(type(config).model_fields) <= set(written)
    untouched = set(PretrainedConfig().to_dict()) - {"architectures", "dtype", "model_type"}
    assert not (untouched - {"transformers_version"}) & set(written)


@proves("save_pretrained(push_to_hub=True)")
def pushed(hub: Hub, tmp_path):
    make_config().save_pretrained(tmp_path, push_to_hub=True, repo_id="me/pushed")
    commit = hub.repositories["me/pushed"].find("main")
    assert b"eagle3" in commit.files["config.json"].content


@proves("reload_schema")
def reloading():
    for model in (TokenProposalConfig, SpeculatorsConfig, SpeculatorModelConfig):
        model.reload_schema()
    reload_schemas()
    reload_and_populate_configs()
