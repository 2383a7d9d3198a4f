"""Real vLLM: engines in this process, one after another, and one real server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from benchmarks import playground
from benchmarks.acceptance.engines import Decoding
from benchmarks.acceptance.measurement import measure
from benchmarks.acceptance.settings import AcceptanceConfig
from benchmarks.acceptance.transformers_engine import TransformersEngine
from benchmarks.acceptance.vllm_engine import VLLMEngine
from speculators_core.format.vocabulary import choose_draft_vocabulary
from speculators_core.models.eagle3 import Eagle3DraftModel
from tests.conftest import make_verifier
from tests.vllm.serving import EAGER, SMALL, as_prompts, fit, run

pytestmark = pytest.mark.vllm

EAGLE3 = str(playground.EAGLE3)


def test_playground_is_lossless_and_vllm_agrees_with_the_reference():
    names = tuple(map(str, playground.SPECULATORS.values()))
    common = {"limit_per_category": 2, "max_tokens": 48, "model": names}
    served = measure(AcceptanceConfig(engine="vllm", **common))
    reference = measure(AcceptanceConfig(engine="transformers", **common))
    for in_vllm, decoded in zip(served.drafts, reference.drafts, strict=True):
        assert in_vllm.by_k[0].num_identical == decoded.by_k[0].num_identical == 8
        requests = zip(in_vllm.by_k[0].requests, decoded.by_k[0].requests, strict=True)
        for ours, theirs in requests:
            assert ours.output_ids == theirs.output_ids
            assert ours.accepted == theirs.accepted
        assert in_vllm.by_k[0].pooled.acceptance_length > 1.5
    assert served.prompts_sha256 == reference.prompts_sha256


def test_concurrent_requests_get_what_each_gets_alone():
    common = {"limit_per_category": 2, "max_tokens": 24, "k": (2,), "model": (EAGLE3,)}
    alone = measure(AcceptanceConfig(concurrency=1, **common))
    together = measure(AcceptanceConfig(concurrency=8, **common))
    (ours_by_k,), (theirs_by_k,) = together.drafts[0].by_k, alone.drafts[0].by_k
    for ours, theirs in zip(ours_by_k.requests, theirs_by_k.requests, strict=True):
        assert ours.output_ids == theirs.output_ids
        assert ours.accepted == theirs.accepted


def test_sampled_runs_differ_and_are_not_compared():
    report = measure(
        AcceptanceConfig(
            model=(EAGLE3,),
            temperature=1.0,
            runs=2,
            k=(2,),
            limit_per_category=1,
            max_tokens=16,
            engine_args={"max_model_len": 600},
        )
    )
    (entry,) = report.drafts[0].by_k
    first, second = entry.requests[:4], entry.requests[4:]
    assert [r.output_ids for r in first] != [r.output_ids for r in second]
    assert entry.num_identical is None
    assert report.settings["engine_args"] == {
        "enforce_eager": True,
        "seed": 0,
        "max_model_len": 600,
    }


VARIANTS = {
    "qwen3 layers, fc_norm, two aux layers, reduced vocabulary": {
        "layer_type": "qwen3",
        "num_layers": 2,
        "fc_norm": True,
        "norm_before_fc": False,
        "norm_output": False,
        "aux_layer_ids": (1, 3),
        "reduced": True,
    },
    "llama layers, norms before fc and on the output, four aux layers": {
        "aux_layer_ids": (0, 1, 2, 4),
    },
    "llama layer, no norm option, sliding window": {
        "aux_layer_ids": (1, 2, 3),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "norm_output": False,
        "sliding_window": 16,
    },
}


@pytest.fixture(scope="module")
def small_verifier(tmp_path_factory) -> Path:
    """Shaped so that vLLM's CPU attention takes it."""
    verifier = make_verifier(**SMALL)
    folder = tmp_path_factory.mktemp("small") / "verifier"
    verifier.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_draft_serves_as_it_decodes(small_verifier, tmp_path, variant):
    verifier = Qwen3ForCausalLM.from_pretrained(small_verifier).eval()
    options = dict(VARIANTS[variant])
    maps = (None, None)
    if options.pop("reduced", False):
        maps = choose_draft_vocabulary({i: 1 for i in range(20, 120)}, 100, 128, always=[0])
    torch.manual_seed(1)
    model = Eagle3DraftModel.from_training_args(
        verifier.config, *maps, verifier=verifier, name_or_path=str(small_verifier), **options
    )
    fit(model, verifier)
    model.save_pretrained(tmp_path)
    prompts = as_prompts([[5, 9, 17], [40], list(range(60, 100))])
    decoding = Decoding(60, 0.0, 0, ignore_eos=True)
    arguments = (str(small_verifier), "float32", 1)
    reference = run(TransformersEngine(*arguments), tmp_path, 4, prompts, decoding)
    served = run(VLLMEngine(*arguments, dict(EAGER)), tmp_path, 4, prompts, decoding)
    assert sum(map(sum, (r.accepted for r in reference))) >= 10
    for ours, theirs in zip(served, reference, strict=True):
        assert ours.output_ids == theirs.output_ids
        assert ours.accepted == theirs.accepted


STOCK = """
import json, sys
from vllm import LLM, SamplingParams
verifier, speculator, prompts = json.loads(sys.argv[1])
llm = LLM(verifier, dtype="float32", enforce_eager=True, max_model_len=512,
          per_request_spec_decode_metrics="detailed",
          speculative_config={"model": speculator, "method": "eagle3",
                              "num_speculative_tokens": 3})
from vllm.engine.arg_utils import EngineArgs
assert not hasattr(EngineArgs.create_speculative_config, "_speculators_vllm")
for ids in prompts:
    (output,) = llm.generate({"prompt_token_ids": ids},
                             SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
    done = output.outputs[0]
    print("RESULT", json.dumps([list(done.token_ids), done.spec_decode_metrics.per_step_accepted]))
"""


@pytest.mark.slow
def test_stock_vllm_serves_our_checkpoint_with_the_same_counts():
    from transformers import AutoTokenizer

    from speculators_core.decoding.prompts import read_prompts, tokenize

    tokenizer = AutoTokenizer.from_pretrained(playground.VERIFIER)
    prompts = tokenize(read_prompts(playground.PROMPTS, limit_per_category=1), tokenizer, 512)
    arguments = (str(playground.VERIFIER), str(playground.EAGLE3))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            STOCK,
            json.dumps([*arguments, [prompt.token_ids for prompt in prompts]]),
        ],
        env={**os.environ, "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
    )
    results = [
        json.loads(line.split("RESULT ")[1])
        for line in done.stdout.splitlines()
        if "RESULT " in line
    ]
    assert len(results) == len(prompts), done.stderr[-2000:]
    engine = TransformersEngine(str(playground.VERIFIER), "float32", 1)
    reference = run(engine, EAGLE3, 3, prompts, Decoding(48, 0.0, 0, False))
    for (token_ids, accepted), record in zip(results, reference, strict=True):
        assert token_ids == record.output_ids
        assert accepted == record.accepted


def test_wrong_verifier_is_one_line_before_any_weights(small_verifier):
    from vllm import LLM

    with pytest.raises(ValueError, match="hidden size 64; the speculator was made for 128"):
        LLM(
            str(small_verifier),
            dtype="float32",
            speculative_config={"model": str(playground.EAGLE3)},
            **EAGER,
        )


@pytest.mark.slow
def test_untrained_drafts_are_measured_in_vllm():
    """In a process of its own: vLLM 0.32 cannot start again after its prompt lookup."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.acceptance",
        "--model",
        "prompt-lookup",
    ]
    command += [str(playground.VERIFIER), "--verifier", str(playground.VERIFIER)]
    command += ["--limit-per-category", "1", "--max-tokens", "24"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines() if "4 of 4" in line]
    assert [row[1] for row in rows] == ["verifier", "prompt-lookup"]
    assert rows[0][5] == "4.000"  # the verifier agrees with itself
