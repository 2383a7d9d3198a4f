"""Hidden states out of real vLLM engines in this process: two starts, shared by the tests."""

import resource
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from speculators_core.errors import SpeculatorError
from speculators_vllm import offline
from speculators_vllm.hidden_states import (
    FileSink,
    HiddenStateReceiver,
    StreamSink,
    drain,
    engine_arguments,
    read_hidden_states,
)
from tests.conftest import make_verifier

pytestmark = pytest.mark.vllm

LAYER_IDS = (0, 1, 3, 4)
"""The last is all four layers, before the final norm."""
LENGTHS = (1, 5, 16, 33, 130, 300)
MAX_MODEL_LEN = 512
IN_FLIGHT_BYTES = 200_000
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def verifier():
    """Shaped so that vLLM's CPU attention takes it."""
    return make_verifier(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.05,
    )


@pytest.fixture(scope="module")
def verifier_folder(verifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verifier")
    verifier.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def running():
    """Starts an engine, and ends the one before it: vLLM has one KV connector a process."""
    with ExitStack() as stack:
        engines = {}

        def run(name, **arguments):
            if name not in engines:
                stack.close()
                engines.clear()
                engines[name] = stack.enter_context(offline.loaded(**arguments))
            return engines[name]

        yield run


def engine_of(verifier_folder, sink, **arguments):
    return {
        "model": str(verifier_folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "block_size": 32,
        **offline.default_arguments(),
        **engine_arguments(verifier_folder, LAYER_IDS[:-1], sink),
        **arguments,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sink") / "states"


@pytest.fixture
def files(running, verifier_folder, folder):
    """Prefix caching, and prompts in chunks of 64 tokens."""
    sink = FileSink(folder=folder)
    return running("files", **engine_of(verifier_folder, sink, max_num_batched_tokens=64))


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    return f"ipc://{tmp_path_factory.mktemp('ipc')}/states"


@pytest.fixture
def stream(running, verifier_folder, endpoint):
    """17 blocks of 32 tokens in all, so that requests are preempted; no prefix caching."""
    sink = StreamSink(
        endpoint=endpoint, by_default="all", max_in_flight_bytes=IN_FLIGHT_BYTES, linger_s=1
    )
    small = {"num_gpu_blocks_override": 18, "enable_prefix_caching": False}
    return running("stream", **engine_of(verifier_folder, sink, **small))


def prompts_of(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]


def parameters(max_tokens=1, n=1, **options):
    from vllm import SamplingParams

    extra = {"kv_transfer_params": options} if options else None
    return SamplingParams(
        max_tokens=max_tokens, temperature=float(n > 1), n=n, ignore_eos=True, extra_args=extra
    )


def generate(llm, prompts, parameters):
    with_ids = [{"prompt_token_ids": token_ids} for token_ids in prompts]
    outputs = llm.generate(with_ids, parameters, use_tqdm=False)
    drain(llm, timeout_s=10)
    return outputs


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def is_clean(llm):
    """No block is held, no request remembered, and nothing on its way."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    scheduler, courier = scheduler_of(llm), get_kv_transfer_group().courier
    pool, ledger = scheduler.kv_cache_manager.block_pool, scheduler.connector.ledger
    left = (ledger.requested, ledger.answers, ledger.saves, ledger.keeping, scheduler.requests)
    under_way = (courier.waiting, courier.copying, courier.outbox.in_flight_bytes)
    return (
        pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's null block
        and not any(left)
        and not any(under_way)
    )


def assert_are_the_verifiers(states, verifier):
    caught = {}
    hook = verifier.model.norm.register_forward_pre_hook(lambda _, args: caught.update(x=args[0]))
    with torch.no_grad():
        found = verifier(states.token_ids[None], output_hidden_states=True).hidden_states
    hook.remove()
    expected = torch.cat([*(found[i] for i in LAYER_IDS[:-1]), caught["x"]]).transpose(0, 1)
    assert states.layer_ids == LAYER_IDS
    assert states.hidden_states.shape == expected.shape
    assert (states.hidden_states - expected).abs().max() < TOLERANCE


# Files.


def test_states_of_prompts_and_outputs_are_those_of_transformers(files, verifier):
    prompts = prompts_of(LENGTHS)
    asked = parameters(max_tokens=12, hidden_states="all")
    for from_cache in (False, True):
        outputs = generate(files, prompts, asked)
        assert (outputs[-1].num_cached_tokens > 0) == from_cache
        for prompt, output in zip(prompts, outputs, strict=True):
            states = read_hidden_states(output.kv_transfer_params, timeout_s=0)
            token_ids = prompt + list(output.outputs[0].token_ids)
            assert states.token_ids.tolist() == token_ids[:-1]
            assert states.num_prompt_tokens == len(prompt)
            assert states.hidden_states.dtype == torch.float32
            assert_are_the_verifiers(states, verifier)
    assert is_clean(files)


def test_requests_that_fill_the_context_have_all_their_states(files, verifier):
    """vLLM skips the drafter, which keeps the states, where one more token would not fit."""
    prompts = prompts_of((MAX_MODEL_LEN - 1, MAX_MODEL_LEN - 9, 40), seed=4)
    outputs = generate(files, prompts, parameters(max_tokens=64, hidden_states="all"))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 9, 64]
    for output in outputs:
        assert_are_the_verifiers(read_hidden_states(output.kv_transfer_params, 0), verifier)


def test_a_request_chooses_its_tokens_and_the_default_is_its_prompt(files, folder):
    prompts = prompts_of((40, 40, 40), seed=5)
    asked = [
        parameters(max_tokens=6),
        parameters(max_tokens=6, hidden_states="none"),
        parameters(max_tokens=6, hidden_states="prompt", name="shard-0/first"),
    ]
    files_before = set(folder.rglob("*"))
    default, nothing, named = generate(files, prompts, asked)
    assert read_hidden_states(default.kv_transfer_params).token_ids.tolist() == prompts[0]
    assert nothing.kv_transfer_params is None
    assert named.kv_transfer_params == {
        "name": "shard-0/first",
        "num_tokens": 40,
        "hidden_states_path": str(folder / "shard-0" / "first.safetensors"),
    }
    assert read_hidden_states(named.kv_transfer_params).name == "shard-0/first"
    new = {path for path in set(folder.rglob("*")) - files_before if path.is_file()}
    assert {str(p) for p in new} == {
        answer.kv_transfer_params["hidden_states_path"] for answer in (default, named)
    }


def test_a_malformed_request_fails_alone(files, folder, tmp_path):
    (folder / "link").symlink_to(tmp_path)
    save_file({"x": torch.zeros(1)}, folder / "there.safetensors")
    malformed = {
        "hidden_states": {"hidden_states": "everything"},
        "hidden_state": {"hidden_state": "all"},
        "do_remote_prefill": {"do_remote_prefill": True},
        "String should match": {"name": "../outside"},
        "should be a valid string": {"name": 3},
        "at most 200": {"name": "x" * 201},
        "leads out of": {"name": "link/outside"},
        "'there' is taken": {"name": "there"},
        "'twice' is taken": {"name": "twice"},
    }
    asked = [parameters(name="twice")]
    asked += [parameters(max_tokens=3, **options) for options in malformed.values()]
    asked += [parameters(max_tokens=3, n=2), parameters(max_tokens=3, hidden_states="all")]
    outputs = generate(files, prompts_of([20] * len(asked), seed=6), asked)
    assert read_hidden_states(outputs[0].kv_transfer_params).name == "twice"
    for complaint, output in zip([*malformed, "n is over 1"], outputs[1:-1], strict=True):
        error = output.kv_transfer_params["error"]
        assert complaint in error and "\n" not in error
        assert len(output.outputs[0].token_ids) == 3
        with pytest.raises(SpeculatorError, match="got no hidden states"):
            read_hidden_states(output.kv_transfer_params)
    assert len(read_hidden_states(outputs[-1].kv_transfer_params).token_ids) == 22
    assert not list(tmp_path.iterdir())
    assert is_clean(files)


def test_an_aborted_request_leaves_nothing(files, folder):
    engine, files_before = files.llm_engine, set(folder.rglob("*"))
    asked = parameters(max_tokens=50, hidden_states="all", name="aborted")
    for num_steps in (0, 1, 2, 9):
        (prompt,) = prompts_of([130], seed=20 + num_steps)
        request_id = engine.add_request("abort", {"prompt_token_ids": prompt}, asked)
        for _ in range(num_steps):
            engine.step()
        request = scheduler_of(files).requests[request_id]
        assert (request.num_computed_tokens > 130) == (num_steps == 9)
        assert (0 < request.num_computed_tokens < 130) == (num_steps in (1, 2))
        engine.abort_request([request_id], internal=True)
        generate(files, prompts_of([3], seed=20), parameters(hidden_states="none"))
        assert is_clean(files)
    assert set(folder.rglob("*")) == files_before


def test_states_that_cannot_be_written_fail_alone_and_say_why(files, folder):
    """The system refuses files of more than 100 KB, then the folder is gone."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    prompts = prompts_of((10, 150, 12), seed=8)
    asked = [parameters(name=name) for name in ("small", "large", "small-too")]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        small, large, small_too = generate(files, prompts, asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(SpeculatorError, match="large.safetensors was not written.*too large"):
        read_hidden_states(large.kv_transfer_params)
    for output, prompt in ((small, prompts[0]), (small_too, prompts[2])):
        assert read_hidden_states(output.kv_transfer_params).token_ids.tolist() == prompt
    assert is_clean(files)
    again = generate(files, prompts[1:2], asked[1])[0]
    assert len(read_hidden_states(again.kv_transfer_params).token_ids) == 150
    assert not (folder / "large.error").exists()

    away = folder.rename(folder.with_name("away"))
    (lost,) = generate(files, prompts[:1], parameters())
    with pytest.raises(SpeculatorError, match=f"{folder} is gone"):
        read_hidden_states(lost.kv_transfer_params)
    assert is_clean(files) and not folder.exists()
    away.rename(folder)
    (found,) = generate(files, prompts[:1], parameters())
    assert read_hidden_states(found.kv_transfer_params).token_ids.tolist() == prompts[0]
    assert not [path for path in folder.rglob(".*")]


def request_of(request_id="r", num_tokens=8, **changes):
    """The part of vLLM's request that the ledger reads."""
    from vllm.v1.request import RequestStatus

    fields = {
        "request_id": request_id,
        "sampling_params": parameters(hidden_states="all"),
        "prompt_token_ids": list(range(num_tokens)),
        "prompt_is_token_ids": None,
        "resumable": False,
        "num_prompt_tokens": num_tokens,
        "num_tokens": num_tokens + 1,
        "all_token_ids": list(range(num_tokens + 1)),
        "status": RequestStatus.FINISHED_STOPPED,
        "kv_transfer_params": {},
    }
    return SimpleNamespace(**fields | changes)


@pytest.fixture
def ledger(tmp_path):
    from speculators_vllm.hidden_states.connector import Ledger

    return Ledger(FileSink(folder=tmp_path), group=0, block_size=4)


def test_the_ledger_keeps_blocks_until_they_are_copied_and_names_until_they_are_sent(ledger):
    request = request_of(sampling_params=parameters(hidden_states="all", name="a"))
    ledger.add(request)
    keeps, answer = ledger.finish(request, [7, 8, 9])
    assert keeps and answer["num_tokens"] == 8
    (save,) = ledger.take_saves()
    assert save.block_ids == [7, 8]  # the third is for tokens that were never run
    assert ledger.take_saves() == [] and ledger.keeping == {"r"} and ledger.has_pending()
    ledger.add(request_of("s", sampling_params=request.sampling_params))
    assert "name 'a' is taken" in ledger.finish(request_of("s"), [1, 2])[1]["error"]
    ledger.release({"r"}, {})
    assert not ledger.keeping and ledger.has_pending()
    ledger.release(set(), {"r": "disk is full"})
    assert not ledger.has_pending() and not ledger.answers


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_token_ids": None}, "The prompt has embeddings"),
        ({"resumable": True}, "The prompt is streamed"),
        ({"request_id": "0_r"}, "n is over 1"),
    ],
)
def test_requests_without_whole_states_get_the_reason(ledger, changes, reason):
    request = request_of(**changes)
    ledger.add(request)
    keeps, answer = ledger.finish(request, [1, 2])
    assert not keeps and reason in answer["error"]
    assert request.kv_transfer_params is None  # vLLM does not act on the options either
    assert not ledger.answers and not ledger.has_pending()


def test_requests_that_ended_early_get_the_reason_and_leave_nothing(ledger):
    from vllm.v1.request import RequestStatus

    for changes, block_ids in (({}, [1]), ({"status": RequestStatus.FINISHED_ABORTED}, [1, 2])):
        request = request_of(**changes)
        ledger.add(request)
        keeps, answer = ledger.finish(request, block_ids)
        assert not keeps
        assert f"Blocks of {4 * len(block_ids)} tokens are left, expected 8" in answer["error"]
        assert not (ledger.answers or ledger.requested or ledger.saves or ledger.keeping)


def test_pooling_requests_are_none_of_the_ledgers(ledger):
    request = request_of(sampling_params=None)
    ledger.add(request)
    assert ledger.finish(request, [1, 2]) == (False, None)


def test_a_second_engine_in_the_process_is_refused(files):
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group()
    layer = f"cache_only_layers.{LAYER_IDS[-1]}"
    with pytest.raises(SpeculatorError, match="in this process"):
        connector.register_kv_caches({layer: connector.courier.cache.transpose(1, 2)})


# The stream.


def test_preempted_requests_send_whole_states(stream, endpoint, verifier, monkeypatch):
    preempted = []
    preempt = scheduler_of(stream)._preempt_request
    monkeypatch.setattr(
        scheduler_of(stream),
        "_preempt_request",
        lambda request, *a, **k: (preempted.append(request.request_id), preempt(request, *a, **k)),
    )
    prompts = prompts_of((60, 61, 62, 63, 64, 65), seed=9)
    with HiddenStateReceiver(endpoint, timeout_s=20, max_waiting=8) as receiver:
        asked = [parameters(max_tokens=90, name=f"r{i}") for i in range(len(prompts))]
        outputs = generate(stream, prompts, asked)
        by_name = {states.name: states for _, states in zip(prompts, receiver, strict=False)}
    assert preempted
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        states = by_name[f"r{i}"]
        assert output.kv_transfer_params["hidden_states_endpoint"] == endpoint
        assert states.token_ids.tolist() == (prompt + list(output.outputs[0].token_ids))[:-1]
        assert_are_the_verifiers(states, verifier)
    assert is_clean(stream)


def test_a_slow_reader_pauses_the_engine_and_loses_nothing(stream, endpoint, verifier):
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    engine, outbox = stream.llm_engine, get_kv_transfer_group().courier.outbox
    prompts = prompts_of([150] * 12, seed=10)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, parameters(name=f"slow-{i}"))
    most, done = 0, 0
    for _ in range(60):  # nobody receives
        done += sum(output.finished for output in engine.step())
        most = max(most, outbox.in_flight_bytes)
    assert 0 < most <= IN_FLIGHT_BYTES
    assert 0 < done < len(prompts)
    paused_at = done
    for _ in range(10):
        done += sum(output.finished for output in engine.step())
    assert done == paused_at and not is_clean(stream)
    received = []
    with HiddenStateReceiver(endpoint, timeout_s=0.05, max_waiting=1) as receiver:
        while len(received) < len(prompts):
            engine.step()
            try:
                received.append(receiver.receive())
            except SpeculatorError:
                pass
        drain(stream)
        with pytest.raises(SpeculatorError, match="No hidden states came"):
            receiver.receive()
    assert {states.name for states in received} == {f"slow-{i}" for i in range(len(prompts))}
    for states in received:
        assert states.token_ids.tolist() == prompts[int(states.name.removeprefix("slow-"))]
    assert_are_the_verifiers(received[-1], verifier)
    assert is_clean(stream)


def test_drain_gives_up_where_nobody_receives(stream, endpoint):
    prompt = {"prompt_token_ids": prompts_of([9])[0]}
    stream.generate([prompt], parameters(), use_tqdm=False)
    with pytest.raises(SpeculatorError, match="not sent within 0.2 s"):
        drain(stream, timeout_s=0.2)
    with HiddenStateReceiver(endpoint, timeout_s=20) as receiver:
        assert receiver.receive().num_prompt_tokens == 9
        drain(stream)
    assert is_clean(stream)
