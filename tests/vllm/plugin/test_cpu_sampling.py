"""Sampled and seeded requests under speculation on a CPU, which vLLM 0.32 gets wrong alone."""

from types import SimpleNamespace

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


def patches_that(*succeed):
    """Stand-ins that record when they are applied."""
    applied = []
    made = [
        SimpleNamespace(apply=lambda number=number, fits=fits: applied.append(number) or fits)
        for number, fits in enumerate(succeed)
    ]
    return applied, made


def test_samplers_are_patched_before_a_worker_uses_them(monkeypatch):
    """Generators are hidden from vLLM only where they are restored."""
    sampling, two = patches_that(False, True)
    generators, three = patches_that(True, False, True)
    monkeypatch.setattr(patches, "FOR_CPU_SAMPLING", two)
    monkeypatch.setattr(patches, "FOR_CPU_GENERATORS", three)
    seen = []
    cpu_sampling.patching_samplers(lambda: seen.append([*sampling, *generators]))()
    assert seen == [[0, 1, 0, 1]]


def test_no_logits_are_not_constrained():
    constrain = cpu_sampling.constraining(lambda logits, *_: logits - 1)
    assert constrain(torch.zeros(0, 5), torch.tensor([0]), None).shape == (0, 5)
    assert constrain(torch.zeros(2, 5), torch.tensor([2]), None).tolist() == [[-1.0] * 5] * 2


def test_generators_are_restored_where_vllm_fails():
    generator = torch.Generator()
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(num_reqs=2, generators={0: generator, 1: torch.Generator()}),
        discard_request_mask=SimpleNamespace(np=[True, False, True]),
    )
    hidden = []

    def bookkeep(runner, *args):
        hidden.extend(runner.input_batch.generators)
        raise RuntimeError("of vLLM")

    with pytest.raises(RuntimeError, match="of vLLM"):
        cpu_sampling.hiding_generators(bookkeep)(runner, "output")
    assert hidden == [1] and runner.input_batch.generators[0] is generator
