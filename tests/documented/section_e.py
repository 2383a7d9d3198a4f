"""Document E: overview."""

import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.playground import VERIFIER
from docs.generated import ROOT
from speculators_core import (
    GlobalConfig,
    InferenceParameters,
    SpeculativeConfig,
    SpeculativeDecodingConfig,
    SpeculativeInferenceEngine,
    SpeculatorError,
)
from speculators_core.training.settings import TrainRunConfig
from speculators_core.training.zero import read_deepspeed_config
from tests.documented.rows import proves

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@proves(
    "SpeculativeInferenceEngine and SpeculativeConfig",
    "main_model_path as a model object",
    "engine.generate(input_ids=, max_new_tokens=, do_sample=)",
)
def documented_example():
    model = AutoModelForCausalLM.from_pretrained(VERIFIER)
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    config = SpeculativeConfig(
        main_model_path=model,
        draft_model_path=str(VERIFIER),
        max_speculative_tokens=5,
        temperature=0.7,
        top_p=0.9,
    )
    engine = SpeculativeInferenceEngine(
        main_model=model, draft_model=model, tokenizer=tokenizer, config=config
    )
    ids = tokenizer.encode("import os\n", return_tensors="pt")
    found = engine.generate(input_ids=ids, max_new_tokens=12, do_sample=True)
    assert found.shape[0] == 1 and torch.equal(found[:, : ids.shape[1]], ids)
    greedy = engine.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=12, do_sample=False))


@proves("InferenceParameters", "SpeculativeDecodingConfig", "GlobalConfig", "acceptance_threshold")
def documented_configs():
    assert InferenceParameters().model_dump() == {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 128,
        "do_sample": True,
    }
    config = GlobalConfig(
        speculative=SpeculativeDecodingConfig(
            draft_model_path="draft", main_model_path="main", acceptance_threshold=0.95
        )
    )
    assert config.speculative.max_speculative_tokens == 5 and not config.speculative.use_vllm
    assert SpeculativeConfig.of(config).acceptance_threshold == 0.95
    assert SpeculativeConfig(main_model_path="a", draft_model_path="b").acceptance_threshold == 1


@proves("use_vllm")
def on_vllm():
    """Run on a real vLLM by tests/vllm/generation/test_speculation.py."""
    config = SpeculativeDecodingConfig(draft_model_path="a", main_model_path="b", use_vllm=True)
    assert SpeculativeConfig.of(config).use_vllm


@proves("Black", "Tox")
def tools():
    assert PROJECT["tool"]["black"]["line-length"] == PROJECT["tool"]["ruff"]["line-length"]
    assert ["make", "test"] in PROJECT["tool"]["tox"]["env_run_base"]["commands"]


@proves("DeepSpeed", "pip extras [vllm, deepspeed]")
def deepspeed(tmp_path, monkeypatch):
    """Run where it is installed by tests/training/test_zero.py."""
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["vllm"] == extras["cuda"] and extras["deepspeed"]
    assert "deepspeed" in TrainRunConfig.model_fields
    monkeypatch.setattr("speculators_core.training.zero.find_spec", lambda name: None)
    with pytest.raises(SpeculatorError, match="DeepSpeed is not installed"):
        read_deepspeed_config(tmp_path / "zero.json")


@proves("setuptools_git_versioning, get_next_version, write_version_files")
def static_version():
    assert "version" in PROJECT["project"]
    code = "from speculators_core.cli import main; main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == version("speculators-vllm")
