"""Sampled and seeded requests under speculation on a CPU, which vLLM 0.32 gets wrong alone."""

import logging
import sys

import pytest
import torch

from benchmarks import playground
from speculators_vllm import offline
from speculators_vllm.plugin import cpu_sampling, patches

pytestmark = pytest.mark.vllm

PROMPTS = [list(range(5, 45)), list(range(100, 300)), [7] * 9]


@pytest.fixture(scope="module")
def llm():
    if offline.has_gpu():
        pytest.skip("vLLM for a GPU has other kernels")
    with offline.loaded(
        model=str(playground.VERIFIER),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=64,  # prompts are read in parts: samples are thrown away
        speculative_config={"model": str(playground.SPECULATORS["mtp"])},
        **offline.default_arguments(),
    ) as loaded:
        yield loaded


def sample(llm, prompts, **options):
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=1.0, max_tokens=32, ignore_eos=True, **options)
    return offline.continue_all(llm, prompts, parameters)


def test_seeded_requests_are_repeated(llm):
    together = sample(llm, PROMPTS, seed=11, top_p=0.9)
    again = sample(llm, PROMPTS, seed=11, top_p=0.9)
    others = sample(llm, PROMPTS, seed=12, top_p=0.9)
    assert [one.token_ids for one in together] == [one.token_ids for one in again]
    assert [one.token_ids for one in together] != [one.token_ids for one in others]


def test_a_seeded_request_owes_nothing_to_its_neighbours(llm):
    together = sample(llm, PROMPTS, seed=11)
    alone = [sample(llm, [prompt], seed=11)[0] for prompt in PROMPTS]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_sampling_of_the_best_token_alone_is_greedy(llm):
    """A request's own top-k and temperature hold at drafted places too."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    expected = offline.continue_all(llm, PROMPTS, greedy)
    found = sample(llm, PROMPTS, top_k=1)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.accepted for one in found] == [one.accepted for one in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_settings_are_spread_over_drafted_tokens(dtype):
    """values [3 0 7], tokens up to [2 2 5], 0 becomes 1."""
    output = torch.full((5,), -1, dtype=dtype)
    values, ends = torch.tensor([3, 0, 7], dtype=dtype), torch.tensor([2, 2, 5])
    cpu_sampling.expand(output, values, ends, 0, 1)
    assert output.tolist() == [3, 3, 7, 7, 7]
    cpu_sampling.expand(output[:3], values[:2], torch.tensor([1, 3]), 0, 1)
    assert output[:3].tolist() == [3, 1, 1]


def test_samplers_that_have_moved_are_left_alone(monkeypatch, caplog):
    called = []
    monkeypatch.setitem(sys.modules, "vllm.utils.cpu_triton_utils", None)
    monkeypatch.delattr("vllm.utils.cpu_triton_utils", raising=False)
    monkeypatch.setattr(logging.getLogger("speculators_vllm"), "propagate", True)
    with caplog.at_level("WARNING", logger="speculators_vllm"):
        patches._mending_sampling(lambda: called.append("vLLM's own"))()
    assert called == ["vLLM's own"]
    assert "left vLLM's sampling on CPUs alone" in caplog.text
