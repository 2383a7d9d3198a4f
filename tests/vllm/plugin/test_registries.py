import logging

from vllm.transformers_utils import config

from speculators_vllm.plugin import registries
from speculators_vllm.plugin.draft_config import DraftConfig


def test_speculators_are_read_by_our_config(monkeypatch):
    table = {"speculators": None, "llama": None}
    monkeypatch.setattr(config, "_CONFIG_REGISTRY", table)
    registries.replace_config_class()
    assert table == {"speculators": DraftConfig, "llama": None}


def test_a_table_that_has_moved_is_left_alone(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("speculators_vllm"), "propagate", True)
    monkeypatch.setattr(config, "_CONFIG_REGISTRY", {})
    registries.replace_config_class()
    assert not config._CONFIG_REGISTRY
    assert "found no vLLM config class for speculators" in caplog.text
