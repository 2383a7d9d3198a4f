"""A draft's positions follow the length that the engine serves."""

import json
import logging
import shutil

import pytest
from transformers import Qwen3Config

from benchmarks import playground
from speculators_vllm import offline
from speculators_vllm.plugin.positions import can_extend
from tests.vllm.plugin.test_engine_arguments import config_of

pytestmark = pytest.mark.vllm


@pytest.fixture
def warnings(caplog, monkeypatch):
    caplog.set_level(logging.WARNING, logger="speculators_vllm")
    monkeypatch.setattr(logging.getLogger("speculators_vllm"), "propagate", True)
    return caplog


@pytest.fixture
def short(tmp_path):
    """A speculator with few positions."""

    def copy(algorithm: str, **rope) -> str:
        folder = shutil.copytree(playground.SPECULATORS[algorithm], tmp_path / algorithm)
        config = json.loads((folder / "config.json").read_text())
        config["transformer_layer_config"]["max_position_embeddings"] = 128
        config["transformer_layer_config"]["rope_parameters"].update(rope)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return copy


@pytest.mark.parametrize("algorithm", sorted(playground.SPECULATORS))
def test_positions_follow_the_served_length(algorithm, short, warnings):
    speculative = {"model": short(algorithm)}
    config = config_of(
        model=str(playground.VERIFIER), max_model_len=1024, speculative_config=speculative
    )
    draft = config.speculative_config.draft_model_config
    assert draft.max_model_len == draft.hf_config.max_position_embeddings == 1024
    assert "128 positions" in warnings.text and "serves 1024" in warnings.text


@pytest.mark.parametrize(
    ("more", "length"), [({"max_model_len": 128}, 128), ({}, 2048)], ids=["fits", "longest"]
)
def test_what_fits_and_what_the_user_sets_stay(more, length, short, warnings):
    speculative = {"model": short("eagle3") if more else str(playground.EAGLE3)}
    config = config_of(model=str(playground.VERIFIER), speculative_config=speculative, **more)
    assert config.speculative_config.draft_model_config.max_model_len == length
    chosen = config_of(
        model=str(playground.VERIFIER), speculative_config={**speculative, "max_model_len": 64}
    )
    assert chosen.speculative_config.draft_model_config.max_model_len == 64
    assert "positions" not in warnings.text


def test_rotary_embeddings_that_depend_on_the_number_are_left_with_a_warning(short, warnings):
    folder = short("dflash", rope_type="dynamic", factor=2.0)
    config = config_of(
        model=str(playground.VERIFIER), max_model_len=1024, speculative_config={"model": folder}
    )
    assert config.speculative_config.draft_model_config.max_model_len == 256
    assert "Serve with --max-model-len 256" in warnings.text


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, True),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, True),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}, False),
    ],
)
def test_tables_that_grow_with_positions_are_extended(rope, expected):
    config = Qwen3Config(rope_parameters=rope)
    assert can_extend(config) == expected
    config.rope_parameters = {"full_attention": rope}  # per kind of layer
    assert can_extend(config) == expected


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "mtp"])
def test_long_requests_are_drafted_for_as_by_a_draft_with_all_positions(algorithm, short):
    """One request beyond the draft's own positions, beside one within them."""
    from vllm import SamplingParams

    prompts = [list(range(5, 305)), list(range(40, 80))]
    parameters = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    found = []
    for draft in (short(algorithm), str(playground.SPECULATORS[algorithm])):
        with offline.loaded(
            model=str(playground.VERIFIER),
            dtype="float32",
            max_model_len=512,
            max_num_seqs=2,
            speculative_config={"model": draft},
            **offline.default_arguments(),
        ) as llm:
            found.append(offline.continue_all(llm, prompts, parameters))
    assert found[0] == found[1]
    assert all(len(one.accepted) > 2 for one in found[0])
