"""Hidden states out of real vLLM engines in this process: two starts, shared by the tests."""

import json
import os
import resource
import time
from contextlib import ExitStack

import pytest
import torch
import zmq
from safetensors.torch import save_file

from speculators_core.errors import SpeculatorError
from speculators_vllm import offline
from speculators_vllm.hidden_states.courier import Courier, Save
from speculators_vllm.hidden_states.files import (
    FORMAT,
    FileWriter,
    HiddenStates,
    read_file,
    read_hidden_states,
)
from speculators_vllm.hidden_states.outbox import Failure, Outbox, PendingStates
from speculators_vllm.hidden_states.settings import (
    FileSink,
    RequestOptions,
    StreamSink,
    engine_arguments,
    name_for,
    path_for,
    read_request,
    read_sink,
)
from speculators_vllm.hidden_states.stream import HiddenStateReceiver, StreamWriter, frames_of
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
    from speculators_vllm.hidden_states.connector import drain

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


def record(num_tokens=3, name="a", dtype=torch.float32):
    return HiddenStates(
        request_id=f"id-{name}",
        name=name,
        layer_ids=(1, 4),
        num_prompt_tokens=2,
        token_ids=torch.arange(num_tokens),
        hidden_states=torch.randn(num_tokens, 2, 8).to(dtype),
    )


def assert_same(ours, theirs):
    assert torch.equal(ours.hidden_states, theirs.hidden_states)
    assert torch.equal(ours.token_ids, theirs.token_ids)
    for field in ("request_id", "name", "layer_ids", "num_prompt_tokens"):
        assert getattr(ours, field) == getattr(theirs, field)


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


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    seen = []

    def watched(source, target):
        seen.append((sorted(p.suffix for p in tmp_path.iterdir()), source.parent == target.parent))
        os.rename(source, target)

    monkeypatch.setattr("speculators_core.files.os.replace", watched)
    states = record()
    FileWriter(tmp_path).write(states)
    assert seen == [([".part"], True)]
    assert_same(read_file(tmp_path / "a.safetensors"), states)
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(OSError):
        FileWriter(tmp_path).write(record(name="b"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}
    with pytest.raises(SpeculatorError, match="cannot be made"):
        FileWriter(tmp_path / "a.safetensors" / "under")


def test_a_file_of_others_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(SpeculatorError, match="was not there after 0.02 s"):
        read_hidden_states({"name": "x", "hidden_states_path": str(path)}, timeout_s=0.02)
    nested = {"name": "n/x", "hidden_states_path": str(tmp_path / "n" / "x.safetensors")}
    with pytest.raises(SpeculatorError, match="was not there after 0.02 s"):
        read_hidden_states(nested, timeout_s=0.02)
    path.write_bytes(b"{}")
    with pytest.raises(SpeculatorError, match="cannot be read"):
        read_file(path)
    save_file({"token_ids": torch.zeros(3)}, path)
    with pytest.raises(SpeculatorError, match="holds no hidden states in the format"):
        read_file(path)
    metadata = {"format": FORMAT, "request_id": "r", "name": "n", "num_prompt_tokens": "2"}
    tensors = {"token_ids": torch.arange(3), "hidden_states": torch.zeros(3, 2, 8)}
    save_file(tensors, path, metadata=metadata | {"layer_ids": "[1, 2, 3]"})
    with pytest.raises(SpeculatorError, match="3 tokens and 3 layers"):
        read_file(path)
    save_file(tensors, path, metadata=metadata | {"layer_ids": "[1, 2]"})
    assert read_file(path).layer_ids == (1, 2)


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

    from speculators_vllm.hidden_states.connector import drain

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
    from speculators_vllm.hidden_states.connector import drain

    prompt = {"prompt_token_ids": prompts_of([9])[0]}
    stream.generate([prompt], parameters(), use_tqdm=False)
    with pytest.raises(SpeculatorError, match="not handed over within 0.2 s"):
        drain(stream, timeout_s=0.2)
    with HiddenStateReceiver(endpoint, timeout_s=20) as receiver:
        assert receiver.receive().num_prompt_tokens == 9
        drain(stream)
    assert is_clean(stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_received_is_what_was_sent(dtype):
    sent = [record(n, name=f"r{n}", dtype=dtype) for n in (2, 7, 3)]
    with HiddenStateReceiver("tcp://127.0.0.1:*", timeout_s=10) as receiver:
        outbox = Outbox(StreamWriter(receiver.endpoint), capacity_bytes=10**6)
        for states in sent:
            outbox.put(PendingStates(states, lambda: None))
        outbox.put(Failure("id-x", "x", "out of memory"))
        for states in sent:
            assert_same(receiver.receive(), states)
        with pytest.raises(SpeculatorError, match=r"id-x \(x\): out of memory"):
            receiver.receive()
        outbox.close(5)
    ended = outbox.take_ended()
    assert ended == {"id-r2": None, "id-r7": None, "id-r3": None, "id-x": "out of memory"}


def test_garbage_is_refused_and_the_next_message_is_received():
    good = [bytes(frame) for frame in frames_of(record())]
    header = json.loads(good[0])

    def changed(**values):
        return [json.dumps(header | values).encode(), *good[1:]]

    garbage = [
        [b""],
        [b"\xff\xfe", b"x"],
        [b"[]", *good[1:]],
        [b"{" * 70_000, *good[1:]],
        changed(format="other"),
        changed(pickle="x"),
        changed(dtype="object"),
        changed(num_tokens=4),
        changed(num_tokens=-1),
        changed(num_tokens=0, num_prompt_tokens=0),
        changed(layer_ids=[1, 2, 3]),
        changed(num_prompt_tokens=4),
        [good[0], good[1]],
        [*good, b""],
        [good[0], good[2], good[1]],
    ]
    with HiddenStateReceiver("tcp://127.0.0.1:*", timeout_s=10) as receiver:
        context = zmq.Context()
        sender = context.socket(zmq.PUSH)
        sender.connect(receiver.endpoint)
        for frames in garbage:
            sender.send_multipart(frames)
            with pytest.raises(SpeculatorError, match="was refused") as refusal:
                receiver.receive()
            assert "\n" not in str(refusal.value)
        sender.send_multipart(good)
        assert receiver.receive().name == "a"
        context.destroy(linger=0)
        with pytest.raises(SpeculatorError, match="within 0.01 s"):
            receiver.receive(timeout_s=0.01)
        with pytest.raises(SpeculatorError, match="cannot be bound"):
            HiddenStateReceiver(receiver.endpoint)


def test_an_outbox_that_nobody_empties_closes_in_time_and_says_what_was_lost():
    outbox = Outbox(StreamWriter("ipc:///nobody/is/here"), capacity_bytes=1000)
    states = record(num_tokens=10)
    assert outbox.has_room(10**9)  # alone, whatever its size
    outbox.put(PendingStates(states, lambda: None))
    assert outbox.in_flight_bytes == states.size_bytes
    assert outbox.has_room(1000 - states.size_bytes)
    assert not outbox.has_room(1001 - states.size_bytes)
    started = time.monotonic()
    outbox.close(0.1)
    assert time.monotonic() - started < 2
    assert outbox.in_flight_bytes == 0
    assert "shut down before" in outbox.take_ended()["id-a"]


# The copy, and the settings.

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 2])
def test_states_are_gathered_from_scattered_blocks(device, parts, tmp_path, monkeypatch):
    """``parts`` blocks of the cache are one of the scheduler's; two blocks are a chunk."""
    cache = torch.randn(14, 2, 4, 8, device=device)  # [blocks, layers, block, hidden]
    monkeypatch.setattr("speculators_vllm.hidden_states.courier.CHUNK_BYTES", 2 * cache[0].nbytes)
    courier = Courier(cache, 4 * parts, (1, 4), FileSink(folder=tmp_path))
    num_tokens = 4 * parts * 3 - 1
    save = Save("id", "a", list(range(num_tokens)), 2, [5, 1, 3])
    copied = courier.step([save], is_idle=False)
    while not copied:
        copied = courier.step([], is_idle=True)
    courier.close()
    assert copied == {"id"} and not courier.copying
    in_cache = [b * parts + part for b in (5, 1, 3) for part in range(parts)]
    expected = torch.cat([cache[b].transpose(0, 1) for b in in_cache])[:num_tokens].cpu()
    assert torch.equal(read_file(tmp_path / "a.safetensors").hidden_states, expected)


def test_a_copy_that_fails_is_reported_and_frees_its_blocks(tmp_path):
    courier = Courier(torch.zeros(4, 2, 4, 8), 4, (1, 4), FileSink(folder=tmp_path))
    bad, good = (Save(name, name, [1] * n, 1, [1]) for name, n in (("b", 9), ("g", 4)))
    assert courier.step([bad, good], is_idle=False) == {"b", "g"}
    courier.close()
    assert list(courier.outbox.take_ended()) == ["b", "g"]
    assert (tmp_path / "g.safetensors").exists()
    with pytest.raises(SpeculatorError, match="must match"):
        read_hidden_states({"name": "b", "hidden_states_path": str(tmp_path / "b.safetensors")})


def test_what_waits_at_shutdown_is_still_sent(tmp_path):
    sink = FileSink(folder=tmp_path, max_in_flight_bytes=1)
    courier = Courier(torch.zeros(4, 2, 4, 8), 4, (1, 4), sink)
    courier.outbox.has_room = lambda size_bytes: False
    assert not courier.step([Save(f"{i}", f"{i}", [1], 1, [i]) for i in range(4)], is_idle=False)
    del courier.outbox.has_room
    courier.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_engine_arguments_name_the_layers(verifier_folder):
    sink = StreamSink(endpoint="tcp://127.0.0.1:5555")

    def layer_ids(*given, **options):
        arguments = engine_arguments(verifier_folder, given, sink, **options)
        config = arguments["speculative_config"]["draft_model_config"]["hf_config"]
        extra = json.loads(json.dumps(arguments["kv_transfer_config"]))
        assert read_sink(extra["kv_connector_extra_config"]) == sink
        return config["eagle_aux_hidden_state_layer_ids"]

    assert layer_ids(0, 2) == [0, 2, 4]
    assert layer_ids(2, 4) == [2, 4]
    assert layer_ids() == [4]
    assert layer_ids(0, 2, with_last=False) == [0, 2]
    for wrong in ((5,), (-1,), (True,), (2, 1), (1, 1)):
        with pytest.raises(SpeculatorError, match=r"ascending ids of 0\.\.4\.$"):
            layer_ids(*wrong)
    with pytest.raises(SpeculatorError, match=r"ascending ids of 0\.\.4\.$"):
        layer_ids(with_last=False)


def test_a_sink_is_checked():
    for wrong in (
        {},
        {"kind": "stream", "endpoint": "udp://x"},
        {"kind": "files", "folder": "/x", "endpoint": "tcp://x"},
        {"kind": "files", "folder": "/x", "max_in_flight_bytes": 0},
    ):
        with pytest.raises(SpeculatorError, match="kv_connector_extra_config"):
            read_sink(wrong)
    assert FileSink(folder="here").folder.is_absolute()


@pytest.mark.parametrize("name", ["a/../b", "..", "/a", "a/", "a//b", ".a", "a\n", "a b", ""])
def test_a_name_stays_in_the_folder(name):
    with pytest.raises(SpeculatorError, match="name: "):
        RequestOptions.read({"name": name}, "here")


def test_a_hostile_request_id_makes_a_safe_name(tmp_path):
    for request_id in ("../../x", "a/b", "..", "x" * 300, "a\0b", "é"):
        assert path_for(tmp_path, name_for(request_id)).parent == tmp_path
    assert name_for("cmpl-1-ab") == "cmpl-1-ab"
    assert name_for("a/b") != name_for("a_b")


def test_requests_that_end_outside_of_the_engine_are_refused():
    from vllm import SamplingParams

    sink = FileSink(folder="x")
    with pytest.raises(SpeculatorError, match="use `stop_token_ids`"):
        read_request(SamplingParams(stop=["x"]), sink)
    with pytest.raises(SpeculatorError, match="n is 2"):
        read_request(SamplingParams(n=2), sink)
    with pytest.raises(SpeculatorError, match="expected an object, found 'all'"):
        read_request(SamplingParams(extra_args={"kv_transfer_params": "all"}), sink)
    assert (
        read_request(SamplingParams(stop=["x"], n=2), FileSink(folder="x", by_default="none"))
        is None
    )
