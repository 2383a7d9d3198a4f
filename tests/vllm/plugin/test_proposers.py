"""What trains is what serves: each algorithm's network in vLLM against the reference decoder."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks import playground
from benchmarks.acceptance.engines import Decoding
from benchmarks.acceptance.transformers_engine import TransformersEngine
from benchmarks.acceptance.vllm_engine import VLLMEngine
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import reload_and_populate_models, reload_schemas
from speculators_core.registry import MODELS
from speculators_vllm.plugin import register as plugin
from speculators_vllm.plugin import registries
from speculators_vllm.plugin.proposers import PROPOSERS
from speculators_vllm.plugin.speculative_config import locate
from tests.conftest import DRAFTS, make_verifier
from tests.data import INTEROP, OTHER_PACKAGE, interop_acceptance
from tests.vllm.serving import EAGER, SMALL, as_prompts, fit, run

pytestmark = pytest.mark.vllm


def served_and_decoded(verifier: Path, speculator: Path, num_tokens: int = 3):
    """What vLLM and the reference decoder make of the same prompts."""
    prompts = as_prompts([[5, 9, 17], [40], list(range(60, 100))])
    decoding = Decoding(60, 0.0, 0, ignore_eos=True)
    arguments = (str(verifier), "float32", 1)
    decoded = run(TransformersEngine(*arguments), speculator, num_tokens, prompts, decoding)
    engine = VLLMEngine(*arguments, EAGER | {"skip_tokenizer_init": True})
    served = run(engine, speculator, num_tokens, prompts, decoding)
    return served, decoded


def assert_same(served, decoded, at_least: int) -> None:
    assert sum(map(sum, (record.accepted for record in decoded))) >= at_least
    for ours, theirs in zip(served, decoded, strict=True):
        assert ours.output_ids == theirs.output_ids
        assert ours.accepted == theirs.accepted


def interop_counts(name: str):
    """Drafts and accepted tokens by position that vLLM gives, for each recorded request."""
    recorded = interop_acceptance()
    k = recorded["speculators"][name]["speculative_tokens"]
    engine = VLLMEngine(str(INTEROP / "verifier"), "float32", 1, dict(EAGER))
    decoding = Decoding(recorded["max_tokens"], 0.0, 0, ignore_eos=True)
    records = run(engine, INTEROP / name, k, as_prompts(recorded["prompts"]), decoding)
    assert [record.output_ids for record in records] == recorded["verifier_only"]
    return [
        {
            "drafts": len(record.accepted),
            "accepted_per_position": [
                sum(kept >= place for kept in record.accepted) for place in range(1, k + 1)
            ],
        }
        for record in records
    ]


def recorded_counts(name: str):
    keys = ("drafts", "accepted_per_position")
    requests = interop_acceptance()["speculators"][name]["requests"]
    return [{key: request[key] for key in keys} for request in requests]


@pytest.mark.parametrize("name", ["eagle3", "peagle", "mtp"])
def test_interop_counts_in_vllm_are_the_recorded_ones(name):
    assert interop_counts(name) == recorded_counts(name)


def test_interop_dflash_was_recorded_with_the_norm_of_the_first_layer(monkeypatch):
    """vLLM's own network on a CPU norms every layer's context keys by the first layer's weights."""
    from speculators_vllm.plugin.networks.dflash import DFlashNetwork

    fixed = interop_counts("dflash")
    monkeypatch.delattr(DFlashNetwork, "_normalize_context_k")
    assert interop_counts("dflash") == recorded_counts("dflash") != fixed
    assert sum(request["drafts"] for request in fixed) == 918  # the reference decoder's


VERIFIERS = {
    "qwen3": lambda: make_verifier(**SMALL),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, num_hidden_layers=3, eos_token_id=None, use_sliding_window=False)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SMALL,
            num_hidden_layers=3,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    ),
}


@pytest.fixture(scope="module")
def small_verifiers(tmp_path_factory) -> dict[str, Path]:
    """One of each family that an MTP draft's block can be of."""
    folders = {}
    for family, make in VERIFIERS.items():
        torch.manual_seed(0)
        folders[family] = tmp_path_factory.mktemp(family) / "verifier"
        verifier = make().eval()
        norm = verifier.get_decoder().norm.weight
        norm.data = torch.rand(norm.shape) + 0.5  # so that states before and after it differ
        verifier.save_pretrained(folders[family])
    return folders


@pytest.mark.parametrize(
    ("family", "state"),
    [("qwen3", "post_norm"), ("qwen2", "post_norm"), ("llama", "post_norm"), ("qwen3", "pre_norm")],
)
def test_mtp_serves_as_it_decodes(small_verifiers, tmp_path, family, state):
    folder = small_verifiers[family]
    verifier = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    model = DRAFTS["mtp"].from_training_args(
        verifier.config, verifier=verifier, name_or_path=str(folder)
    )
    model.config.verifier_state = state
    fit(model, verifier)
    model.save_pretrained(tmp_path / "draft")
    assert_same(*served_and_decoded(folder, tmp_path / "draft"), at_least=10)


DRAFT_OPTIONS = {
    "peagle, norms of each state, two aux layers": (
        "peagle",
        {"aux_layer_ids": (1, 3), "fc_norm": True, "norm_before_fc": False, "mask_token_id": 2},
    ),
    "dflash, causal in the block": (
        "dflash",
        {
            "aux_layer_ids": (1, 2),
            "mask_token_id": 2,
            "block_size": 4,
            "num_layers": 2,
            "causal": True,
        },
    ),
}


@pytest.mark.parametrize("options", DRAFT_OPTIONS)
def test_parallel_drafts_serve_as_they_decode(small_verifiers, tmp_path, options):
    name, recipe = DRAFT_OPTIONS[options]
    folder = small_verifiers["qwen3"]
    verifier = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    model = DRAFTS[name].from_training_args(
        verifier.config, verifier=verifier, name_or_path=str(folder), **recipe
    )
    fit(model, verifier)
    model.save_pretrained(tmp_path / "draft")
    assert_same(*served_and_decoded(folder, tmp_path / "draft"), at_least=10)


def test_dflash_of_full_attention_is_bidirectional_whatever_the_flag(tmp_path):
    """Checkpoints of other trainers say false there; vLLM alone would serve them causally."""
    folder = shutil.copytree(INTEROP / "dflash", tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window_non_causal": False}))
    prompts = as_prompts(interop_acceptance()["prompts"][:3])
    engine = VLLMEngine(str(INTEROP / "verifier"), "float32", 1, dict(EAGER))
    decoding = Decoding(32, 0.0, 0, ignore_eos=True)
    flagged = run(engine, folder, 5, prompts, decoding)
    stated = run(engine, INTEROP / "dflash", 5, prompts, decoding)
    assert [r.accepted for r in flagged] == [r.accepted for r in stated]


@pytest.mark.parametrize("word", ["eagle-", "eagle3", "dflash", "dspark"])
def test_a_path_that_vllm_would_believe_is_refused(tmp_path, word):
    from vllm.engine.arg_utils import EngineArgs

    folder = shutil.copytree(INTEROP / "mtp", tmp_path / f"My-{word.upper()}x")
    settings = {"speculative_config": {"model": str(folder)}, "dtype": "float32"}
    with pytest.raises(SpeculatorError, match=f"the path holds '{word}'.*Rename the folder"):
        EngineArgs(model=str(INTEROP / "verifier"), **settings).create_engine_config()


def test_tokenizer_of_the_user_is_kept(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    tokenizer = shutil.copytree(playground.VERIFIER, tmp_path / "tokenizer")
    config = EngineArgs(
        model=str(playground.SPECULATORS["mtp"]), tokenizer=str(tokenizer), dtype="float32"
    ).create_engine_config()
    assert config.model_config.model == str(playground.VERIFIER)
    assert config.model_config.tokenizer == str(tokenizer)
    assert config.speculative_config.method == "mtp"


def test_revision_of_a_speculator_is_not_looked_for_in_its_verifier():
    with pytest.raises(SpeculatorError, match=r'--revision abc: vLLM.*"revision": "abc"'):
        locate(str(playground.EAGLE3), "../verifier", "abc")


@pytest.fixture
def other_package(monkeypatch):
    """A package with an algorithm of its own on the path, as pip would leave it."""
    folder = str(OTHER_PACKAGE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)  # vLLM looks at networks in processes of its own
    reload_and_populate_models()
    PROPOSERS.reload()
    registries.register_networks.cache_clear()
    plugin.register()
    yield MODELS.load("bigram")
    monkeypatch.undo()
    for module in ("bigram_speculator", "bigram_proposer", "bigram_network"):
        sys.modules.pop(module, None)
    reload_schemas()
    PROPOSERS.reload()


def test_an_algorithm_of_another_package_serves_as_it_decodes(
    other_package, small_verifiers, tmp_path
):
    folder = small_verifiers["qwen3"]
    verifier = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    model = other_package.from_training_args(
        verifier.config, verifier=verifier, name_or_path=str(folder)
    )
    fit(model, verifier)
    model.save_pretrained(tmp_path / "draft")
    assert_same(*served_and_decoded(folder, tmp_path / "draft"), at_least=10)


def test_a_broken_proposer_of_another_package_stops_nothing(monkeypatch, caplog, tmp_path):
    (tmp_path / "broken-1.0.dist-info").mkdir()
    (tmp_path / "broken-1.0.dist-info/METADATA").write_text("Name: broken\nVersion: 1.0\n")
    (tmp_path / "broken-1.0.dist-info/entry_points.txt").write_text(
        "[speculators_vllm.proposers]\nbroken = broken_module:PROPOSER\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    PROPOSERS.reload()
    registries.register_networks.cache_clear()
    with caplog.at_level("WARNING", logger="speculators_vllm"):
        registries.register_networks()
    monkeypatch.undo()
    PROPOSERS.reload()
    assert "left out the proposer broken" in caplog.text
