"""What `vllm serve` and `vllm.LLM` make of a speculator, up to the engine's config."""

import json
import os
import shutil

import pytest

from benchmarks import playground
from speculators_core.errors import SpeculatorError
from speculators_vllm import openmp
from speculators_vllm.hidden_states import FileSink, engine_arguments
from speculators_vllm.plugin import engine_arguments as engine_arguments_of_plugin


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """vLLM changes it for its processes."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def config_of(**arguments):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(dtype="float32", **arguments).create_engine_config()


@pytest.fixture
def copy(tmp_path):
    """A copy of a speculator whose config a test may change."""
    folder = shutil.copytree(playground.EAGLE3, tmp_path / "eagle3")

    def change(edit):
        config = json.loads((folder / "config.json").read_text())
        config["speculators_config"]["verifier"]["name_or_path"] = str(playground.VERIFIER)
        edit(config["speculators_config"])
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return change


def test_speculator_alone_finds_its_verifier_beside_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = config_of(model=str(playground.EAGLE3))
    assert config.model_config.model == str(playground.VERIFIER)
    assert config.model_config.tokenizer == str(playground.VERIFIER)
    assert config.speculative_config.method == "eagle3"
    assert config.speculative_config.num_speculative_tokens == 3


def test_default_proposal_decides_when_the_speculator_is_served_by_name(copy):
    def edit(inner):
        inner["proposal_methods"].append({"proposal_type": "sampling", "speculative_tokens": 6})
        inner["default_proposal_method"] = "sampling"

    folder = copy(edit)
    assert config_of(model=folder).speculative_config.num_speculative_tokens == 6
    chosen = config_of(model=folder, speculative_config={"num_speculative_tokens": 2})
    assert chosen.speculative_config.num_speculative_tokens == 2


def test_the_method_is_not_the_users_to_choose(copy):
    folder = copy(lambda inner: None)
    config = config_of(model=folder, speculative_config={"method": "dflash"})
    assert config.speculative_config.method == "eagle3"


def test_a_model_that_is_no_speculator_is_left_alone():
    config = config_of(model=str(playground.VERIFIER), tokenizer=str(playground.VERIFIER))
    assert config.model_config.model == str(playground.VERIFIER)
    assert config.speculative_config is None


def test_a_fault_of_the_speculator_stops_the_engine(copy):
    folder = copy(lambda inner: inner["proposal_methods"][0].update(speculative_tokens=0))
    with pytest.raises(SpeculatorError, match="speculative_tokens"):
        config_of(model=str(playground.VERIFIER), speculative_config={"model": folder})


@pytest.mark.parametrize("hands_out", [True, False])
def test_a_server_checks_requests_where_the_engine_hands_out_states(
    tmp_path, monkeypatch, hands_out
):
    from vllm.config import KVTransferConfig

    applied = []
    monkeypatch.setattr(
        "speculators_vllm.plugin.patches.Patch.apply", lambda patch: applied.append(patch.name)
    )
    arguments = engine_arguments(playground.VERIFIER, (1, 2), FileSink(folder=tmp_path))
    kv_transfer = KVTransferConfig(**arguments["kv_transfer_config"])
    config_of(
        model=str(playground.VERIFIER),
        speculative_config=arguments["speculative_config"],
        kv_transfer_config=kv_transfer if hands_out else None,
    )
    assert ("add_request" in applied) == hands_out


@pytest.mark.skipif(openmp.library() is None, reason="vLLM for a GPU brings no libiomp5")
def test_processes_of_an_engine_load_intels_openmp(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    config_of(model=str(playground.VERIFIER))
    assert str(openmp.library()) in os.environ["LD_PRELOAD"].split(":")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"runner": "pooling"}, "nothing is generated"),
        ({"kv_cache_dtype": "bfloat16"}, "misreads such keys of a torch.float32 model"),
        ({"structured_outputs_config": {"backend": "outlines"}}, "outlines cannot be imported"),
    ],
)
def test_what_would_stop_the_engine_later_is_refused_at_the_start(arguments, words, monkeypatch):
    monkeypatch.setitem(engine_arguments_of_plugin.BACKENDS, "outlines", "no_such_module")
    drafting = {"speculative_config": {"model": str(playground.EAGLE3)}}
    with pytest.raises(SpeculatorError, match=words):
        config_of(model=str(playground.VERIFIER), **arguments, **drafting)
    config_of(model=str(playground.VERIFIER), **arguments)  # without a draft it is vLLM's matter
