"""Data generation on vLLM: engines in this process, and one in its own."""

import os
import signal
import threading
from contextlib import ExitStack

import pytest
import torch

from speculators_core.data_generation.engines.pipeline import InferencePipeline, schema_of
from speculators_core.data_generation.examples import Failure
from speculators_core.errors import SpeculatorError
from speculators_vllm.generation.engine import VLLMPipeline
from tests.vllm.generating import (
    END_ID,
    WRITES,
    WRITTEN,
    assert_same,
    examples_of,
    plan_of,
    with_transformers,
    write_verifier,
)
from tests.vllm.serving import SMALL

pytestmark = pytest.mark.vllm

POSITIONS = SMALL["max_position_embeddings"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_verifier(tmp_path_factory.mktemp("verifier"))


@pytest.fixture(scope="module")
def running():
    """Starts a pipeline, and ends the one before it: vLLM has one KV connector a process.

    Plans that ask the same of vLLM share an engine.
    """
    with ExitStack() as stack:
        pipelines = {}

        def run(plan):
            pipeline = VLLMPipeline.__new__(VLLMPipeline)
            InferencePipeline.__init__(pipeline, plan, schema_of(plan))
            asked = (plan.engine.model_dump_json(), pipeline.captured_ids)
            if asked not in pipelines:
                stack.close()
                pipelines.clear()
                pipelines[asked] = stack.enter_context(InferencePipeline.from_config(plan))
                assert type(pipelines[asked]) is VLLMPipeline
            pipeline._runner = pipelines[asked]._runner
            return pipeline

        yield run


# Values.

STATES = {
    "what the verifier writes": {**WRITTEN, "logits": "top-k", "top_k": 3},
    "three layers and the last": {"layer_ids": (1, 2, 3)},
    "their mean, and all logits": {"layer_ids": (1, 2, 3), "reduce": "mean", "logits": "full"},
    "logits that need a state which is not kept": {
        "layer_ids": (1, 2, 3),
        "last": False,
        "logits": "top-k",
        "top_k": 5,
    },
}


@pytest.mark.parametrize("states", STATES.values(), ids=STATES)
def test_values_are_those_of_transformers(running, folder, states):
    plan = plan_of(folder, states, **WRITES)
    examples = examples_of(1, 40, 7, 300, 33, 129)
    found = running(plan).run(examples)
    assert_same(found, with_transformers(plan, examples))
    steps = running(plan).steps(examples)  # from the prefix cache
    counts = list(steps)
    assert_same(found, running(plan).run(examples))
    # The token that the verifier wrote last is never read, and is not kept.
    assert sum(counts) == sum(len(one.input_ids) + 1 for one in found)
    num_written = [len(one.input_ids) - one.num_prompt_tokens for one in found]
    if plan.data.states.tokens == "all":
        assert len(counts) > 10
        assert max(num_written) == 39 and min(num_written) < 39
        assert not any(END_ID in one.input_ids for one in found)
    else:
        assert not any(num_written)


def test_written_text_depends_on_the_seed_and_not_on_its_batch(running, folder):
    def written(examples, seed=0, **sampling):
        pipeline = running(greedy)
        pipeline.plan = plan_of(folder, WRITTEN, seed=seed, **WRITES | sampling)
        return [one.input_ids.tolist() for one in pipeline.run(examples)]

    greedy = plan_of(folder, WRITTEN, **WRITES)
    examples = examples_of(9, 20, 31, 8)
    sampled = written(examples, temperature=1.0)
    assert written(examples[2:], temperature=1.0) == sampled[2:]
    assert written(examples, temperature=1.0, seed=1) != sampled
    assert written(examples) != sampled
    assert written(examples, temperature=1.0, top_p=1e-6) == written(examples)
    assert written(examples, temperature=0.5) != sampled
    assert [len(one) for one in written(examples, max_new_tokens=1)] == [9, 20, 31, 8]


# What goes wrong.


def test_an_example_that_fails_leaves_the_others_as_if_it_were_not_there(
    running, folder, monkeypatch
):
    plan = plan_of(folder, WRITTEN, **WRITES)
    pipeline, engine = running(plan), running(plan)._runner._llm.llm_engine
    examples = examples_of(12, 301, 5, 20, 30, 18, 44, seed=4)
    examples[2].input_ids[3] = 128
    add, form = engine.add_request, pipeline.form

    def added(name, prompt, parameters):
        if len(prompt["prompt_token_ids"]) == 44:
            raise ValueError("vLLM wants\nnone of it")
        request_id = add(name, prompt, parameters)
        if len(prompt["prompt_token_ids"]) == 20:
            monkeypatch.setattr(engine, "step", lambda: abort(request_id))
        return request_id

    def abort(request_id):
        monkeypatch.undo()
        engine.abort_request([request_id], internal=True)
        return engine.step()

    def formed(example, token_ids, states):
        if len(example.input_ids) == 30:
            raise RuntimeError("no memory\nat all")
        return form(example, token_ids, states)

    monkeypatch.setattr(engine, "add_request", added)
    pipeline.form = formed
    found = pipeline.run(examples)
    reasons = {one.key: one.reason for one in found if isinstance(one, Failure)}
    assert reasons == {
        "4-1": "301 tokens, expected 1 to 300 (engine.max_length)",
        "4-2": "token id 128 is not in the vocabulary of 128",
        "4-3": "vLLM aborted the request",
        "4-4": "no memory",
        "4-6": "vLLM wants",
    }
    alone = [examples[0], examples[5]]
    assert_same([found[0], found[5]], with_transformers(plan, alone))
    assert running(plan).run([]) == []
    assert_same(running(plan).run(alone), [found[0], found[5]])


def test_states_that_cannot_leave_the_engine_fail_their_example_alone(running, folder, monkeypatch):
    """The copy of one request finds no memory; the text of another has a value that overflowed."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    plan = plan_of(folder, WRITTEN, **WRITES)
    pipeline, courier = running(plan), get_kv_transfer_group().courier
    copy = courier._copy

    def copied(block_ids, num_tokens):
        if len(block_ids) > 1:
            raise RuntimeError("out of memory\nhere")
        states, arrived, wait = copy(block_ids, num_tokens)
        if num_tokens == 14:
            states[3, 1, 2] = torch.inf
        return states, arrived, wait

    monkeypatch.setattr(courier, "_copy", copied)
    monkeypatch.setattr(pipeline, "plan", plan_of(folder, WRITTEN, max_new_tokens=5))
    lost, overflowed, kept = pipeline.run(examples_of(200, 10, 11, seed=5))
    assert lost.reason.endswith("out of memory")
    assert overflowed.reason == "the verifier's states are not finite in float32"
    assert len(kept.input_ids) == 15


# Other engines.


def test_a_text_may_fill_all_positions_and_settings_reach_vllm(running, folder):
    plan = plan_of(
        folder,
        {"layer_ids": (0, 2), "last": False},
        max_length=POSITIONS,
        vllm={"max_num_seqs": 3, "enable-prefix-caching": False},
        device="cpu",
        seed=5,
    )
    examples = examples_of(POSITIONS, POSITIONS - 1, 3)
    assert_same(running(plan).run(examples), with_transformers(plan, examples))
    (too_long,) = running(plan).run(examples_of(POSITIONS + 1))
    assert "513 tokens, expected 1 to 512" in too_long.reason
    config = running(plan)._runner._llm.llm_engine.vllm_config
    assert config.scheduler_config.max_num_seqs == 3
    assert not config.cache_config.enable_prefix_caching
    assert config.model_config.seed == 5


@pytest.mark.slow
def test_an_engine_in_its_own_process_does_the_same_until_it_is_killed(folder, monkeypatch):
    from vllm import envs

    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    plan, examples = plan_of(folder, dtype="bfloat16"), examples_of(30, 4)
    with VLLMPipeline(plan, schema_of(plan)) as pipeline:
        found, expected = pipeline.run(examples), with_transformers(plan, examples)
        for one, other in zip(found, expected, strict=True):
            exact = one.hidden_states.bfloat16().float()
            assert torch.equal(one.hidden_states, exact)
            assert (exact - other.hidden_states).abs().max() < 0.02 * exact.abs().max()
        client = pipeline._runner._llm.llm_engine.engine_core
        (process,) = client.resources.engine_manager.processes
        os.kill(process.pid, signal.SIGSTOP)  # what is asked now waits, when it is killed
        threading.Timer(1, os.kill, (process.pid, signal.SIGKILL)).start()
        for _ in range(2):
            with pytest.raises(SpeculatorError, match="^vLLM stopped: .* Set run.resume") as death:
                pipeline.run(examples)
            assert "\n" not in str(death.value)


REFUSED = {
    "engine.vllm dtype: this command decides": {"vllm": {"dtype": "float16"}},
    "engine.vllm max-model-len|max_model_len: this command": {"vllm": {"max-model-len": 9}},
    "engine.vllm max_num_seq: .*Did you mean 'max_num_seqs'": {"vllm": {"max_num_seq": 1}},
    "vLLM did not start: .*block_size": {"vllm": {"block_size": -1}},
    "engine.device cuda:0: vLLM runs on cpu here": {"device": "cuda:0"},
    "engine.device cpu:x: ": {"device": "cpu:x"},
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_settings_that_vllm_does_not_take_are_refused(folder, complaint):
    plan = plan_of(folder, **REFUSED[complaint])
    with pytest.raises(SpeculatorError, match=complaint) as refusal:
        VLLMPipeline(plan, schema_of(plan))
    assert "\n" not in str(refusal.value)
