"""Data generation by a server: a real one, and a small one that makes every mistake."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from speculators_core import http
from speculators_core.data_generation.engines.pipeline import schema_of
from speculators_core.data_generation.examples import Failure
from speculators_core.errors import SpeculatorError
from speculators_vllm.generation import server as serving
from speculators_vllm.generation.engine import VLLMPipeline
from speculators_vllm.hidden_states import HiddenStates, StreamSink, engine_arguments
from speculators_vllm.hidden_states.files import FileWriter
from speculators_vllm.hidden_states.stream import StreamWriter
from tests.vllm.generating import (
    WRITES,
    WRITTEN,
    assert_same,
    examples_of,
    plan_of,
    with_transformers,
    write_verifier,
)
from tests.vllm.serving import server

LAYER_IDS = (1, 2, 3, 4)
"""What plans of these tests ask for, the last state included."""
HIDDEN_SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_verifier(tmp_path_factory.mktemp("verifier"))


@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_gives_the_values_of_transformers(folder, tmp_path, monkeypatch):
    """Over ZeroMQ, and only with its key; an example that is too long for it fails alone."""
    endpoint = f"ipc://{tmp_path}/states"
    options = engine_arguments(folder, LAYER_IDS, StreamSink(endpoint=endpoint))
    given = [f"--{name.replace('_', '-')}={json.dumps(value)}" for name, value in options.items()]
    more = ("--skip-tokenizer-init", "--max-model-len", "320", "--api-key", "a-key")
    with server(tmp_path / "log", str(folder), *given, *more) as url:
        asked = {"base_url": f"{url}/v1", "roots": (tmp_path,), "max_length": 400}
        wrong = plan_of(folder, **asked, api_key="another")
        with pytest.raises(SpeculatorError, match="HTTP 401: .* Pass the server's key"):
            VLLMPipeline(wrong, schema_of(wrong))
        plan = plan_of(folder, WRITTEN, **asked, **WRITES, api_key="a-key", batch_size=3)
        examples = examples_of(30, 350, 8, 60, 300, 2)
        with VLLMPipeline(plan, schema_of(plan)) as pipeline:
            found = pipeline.run(examples)
            assert "HTTP 400" in found[1].reason and "\n" not in found[1].reason
            expected = with_transformers(plan, examples)
            cut = expected[4].input_ids[:319]
            assert torch.equal(found[4].input_ids, cut)  # the context was full
            assert_same([found[i] for i in (0, 2, 3, 5)], [expected[i] for i in (0, 2, 3, 5)])
        monkeypatch.setenv("OPENAI_API_KEY", "a-key")
        plan = plan_of(folder, **asked)
        with VLLMPipeline(plan, schema_of(plan)) as pipeline:  # binds the endpoint again
            assert_same(pipeline.run(examples[2:4]), with_transformers(plan, examples[2:4]))


# A server of our own.


def handed_out(request, **changes):
    """What a verifier might have made of a request."""
    name, prompt = request["kv_transfer_params"]["name"], request["prompt"]
    stated = {"layer_ids": LAYER_IDS, "hidden_size": HIDDEN_SIZE, "dtype": torch.float32} | changes
    shape = (len(prompt), len(stated["layer_ids"]), stated["hidden_size"])
    return HiddenStates(
        request_id=name,
        name=stated.get("name", name),
        layer_ids=stated["layer_ids"],
        num_prompt_tokens=len(prompt),
        token_ids=torch.tensor(stated.get("token_ids", prompt)),
        hidden_states=torch.full(shape, float(len(prompt)), dtype=stated["dtype"]),
    )


class Answering:
    """How a server answers: ``complete`` gives status and page for a request's body."""

    def __init__(self, complete, models=None):
        self.complete = complete
        self.models = models or {"data": [{"id": "adapter", "parent": "it", "max_model_len": 9}]}
        if models is None:
            self.models["data"].append({"id": "it", "max_model_len": 500})
        self.requests = []
        self.headers = []
        self.at_once = self.most_at_once = 0


@contextmanager
def answering(complete, models=None):
    state, lock = Answering(complete, models), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer(200, state.models)

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.requests.append(request)
                state.headers.append(self.headers)
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            answer = state.complete(request)
            with lock:
                state.at_once -= 1
            self.answer(*answer)

        def answer(self, status, page):
            content = page if isinstance(page, bytes) else json.dumps(page).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """Silence."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", state
    finally:
        http.shutdown()
        http.server_close()


def page(place, finish_reason="length"):
    return 200, {"choices": [{"finish_reason": finish_reason}], "kv_transfer_params": place}


def through_files(folder, **changes):
    writer = FileWriter(folder)

    def complete(request):
        states = handed_out(request, **changes)
        writer.write(states)
        return page({"hidden_states_path": str(folder / f"{states.name}.safetensors")})

    return complete


def forward(folder, url, examples, roots, **engine):
    plan = plan_of(folder, roots=roots, base_url=url, **engine)
    with VLLMPipeline(plan, schema_of(plan)) as pipeline:
        return pipeline.run(examples)


def test_files_are_read_and_removed_and_requests_say_all_that_matters(folder, tmp_path):
    with answering(through_files(tmp_path)) as (url, state):
        examples = examples_of(5, 490, 3, 9, 1)
        plan = plan_of(
            folder,
            WRITTEN,
            (tmp_path,),
            base_url=url,
            max_length=490,
            max_new_tokens=20,
            temperature=0.7,
            top_p=0.9,
            api_key="k",
        )
        with VLLMPipeline(plan, schema_of(plan)) as pipeline:
            found = pipeline.run(examples)
    for one, example in zip(found, examples, strict=True):
        assert torch.equal(one.input_ids, example.input_ids)
        assert (one.hidden_states == len(example.input_ids)).all()
    assert not list(tmp_path.iterdir())
    by_length = {len(request["prompt"]): request for request in state.requests}
    names = {request["kv_transfer_params"].pop("name") for request in state.requests}
    seeds = {request.pop("seed") for request in state.requests}
    assert len(names) == len(seeds) == 5
    assert by_length[5] == {
        "model": "it",
        "prompt": examples[0].input_ids.tolist(),
        "max_tokens": 20,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "stop_token_ids": [17],
        "kv_transfer_params": {"hidden_states": "all"},
    }
    assert by_length[490]["max_tokens"] == 10
    assert {headers["Authorization"] for headers in state.headers} == {"Bearer k"}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_as_many_requests_are_in_flight_as_the_plan_says(folder, tmp_path, batch_size):
    complete = through_files(tmp_path)

    def slowly(request):
        time.sleep(0.05)
        return complete(request)

    with answering(slowly) as (url, state):
        forward(folder, url, examples_of(*[4] * 7), (tmp_path,), batch_size=batch_size)
    assert state.most_at_once == batch_size


def test_a_request_that_fails_does_so_alone(folder, tmp_path):
    complete = through_files(tmp_path)
    answers = {
        3: (400, {"message": "too\nlong"}),
        4: page({"error": "name is taken"}),
        5: page({"hidden_states_path": "unused"}, finish_reason="abort"),
    }

    def some(request):
        if len(request["prompt"]) == 6:
            return through_files(tmp_path, token_ids=[9] * 6)(request)
        if len(request["prompt"]) == 7:
            path = tmp_path / f"{request['kv_transfer_params']['name']}.safetensors"
            path.with_suffix(".error").write_text("disk full")
            return page({"hidden_states_path": str(path)})
        return answers.get(len(request["prompt"])) or complete(request)

    with answering(some) as (url, _):
        found = forward(folder, url, examples_of(3, 4, 5, 6, 7, 8), (tmp_path,))
    *failures, kept = found
    assert all(isinstance(one, Failure) and "\n" not in one.reason for one in failures)
    complaints = ("HTTP 400", "name is taken", "abort", "read other tokens", "disk full")
    for complaint, one in zip(complaints, failures, strict=True):
        assert complaint in one.reason
    assert len(kept.input_ids) == 8


def pointing_to(path):
    return lambda request: page({"hidden_states_path": path(request)})


def name_in(request):
    return request["kv_transfer_params"]["name"]


FAULTS = {
    "hands out no hidden states. Start it with": lambda _: page(None),
    "hands out no hidden states. Start": lambda _: page({"remote_engine_id": "x"}),
    "HTTP 500: oh no": lambda _: (500, b"oh\nno"),
    "HTTP 404: .* Expected a vLLM server": lambda _: (404, b""),
    "HTTP 307: ": lambda _: (307, b"elsewhere"),
    "not an answer of a vLLM server: ": lambda _: (200, b"<html>"),
    "not an answer of a vLLM server: choices": lambda _: (200, {"choices": []}),
    "not an answer of a vLLM server: kv_transfer_params.hidden_states_endpoint": lambda _: page(
        {"hidden_states_endpoint": "udp://x"}
    ),
    "an answer of over 1000 bytes": lambda _: (200, b" " * 1001),
    "no answer in time": lambda _: (time.sleep(0.5), page(None))[1],
    "is outside the allowed folders": pointing_to(lambda r: f"/etc/{name_in(r)}.safetensors"),
    "is outside the allowed": lambda _: page({"hidden_states_endpoint": "ipc:///etc/passwd"}),
    "reports .*other.safetensors for": pointing_to(lambda _: "$roots/other.safetensors"),
    "link.* is outside": pointing_to(lambda r: f"$roots/link/{name_in(r)}.safetensors"),
    r"layers \[1, 2\], width 64": {"layer_ids": (1, 2)},
    r"layers \[1, 2, 3, 4\], width 32, .*expected layers .*width 64": {"hidden_size": 32},
    "bfloat16; expected .*float32. Start it with --spec": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("complaint", FAULTS)
def test_a_server_that_does_not_do_its_part_ends_the_run_in_one_line(
    folder, tmp_path, complaint, monkeypatch
):
    monkeypatch.setattr(serving, "ANSWER_WITHIN_S", 0.3)
    monkeypatch.setattr(http, "MAX_PAGE_BYTES", 1000)
    roots = tmp_path / "roots"
    roots.mkdir()
    (roots / "link").symlink_to(tmp_path)
    fault = FAULTS[complaint]
    if isinstance(fault, dict):
        fault = through_files(roots, **fault)

    def complete(request):
        status, content = fault(request)
        if isinstance(content, dict):
            content = json.loads(json.dumps(content).replace("$roots", str(roots)))
        return status, content

    with answering(complete) as (url, state), pytest.raises(SpeculatorError, match=complaint) as e:
        forward(folder, url, examples_of(*[3] * 40), (roots,), batch_size=2)
    assert "\n" not in str(e.value)
    assert len(state.requests) <= 4  # the others were not sent


def test_states_come_to_one_endpoint_alone(folder, tmp_path):
    writer = StreamWriter(f"ipc://{tmp_path}/first")

    def complete(request):
        if len(request["prompt"]) == 9:
            return page({"hidden_states_endpoint": f"ipc://{tmp_path}/second"})
        threading.Timer(0.1, writer.write, (handed_out(request),)).start()
        return page({"hidden_states_endpoint": writer.endpoint})

    with answering(complete) as (url, _):
        plan = plan_of(folder, roots=(tmp_path,), base_url=url, batch_size=1)
        with VLLMPipeline(plan, schema_of(plan)) as pipeline:
            for _ in range(2):
                found = pipeline.run(examples_of(3, 4))
                assert [one.hidden_states[0, 0, 0].item() for one in found] == [3, 4]
            with pytest.raises(SpeculatorError, match="/second and to .*/first, expected one"):
                pipeline.run(examples_of(9))
    writer.close()


UNASKED = {
    "Connection refused": {"base_url": "http://127.0.0.1:1"},
    "http://.:x": {"base_url": "http://[:x"},
    "engine.vllm: the server at": {"vllm": {"max_num_seqs": 1}},
    "engine.device: the server at": {"device": "cpu"},
    "/v1/models: not an answer of a vLLM server: data": {"models": {"data": []}},
}


@pytest.mark.parametrize("complaint", UNASKED)
def test_a_server_that_cannot_be_asked_is_refused_at_the_start(folder, complaint):
    options = dict(UNASKED[complaint])
    with answering(None, options.pop("models", None)) as (url, _):
        plan = plan_of(folder, **{"base_url": url} | options)
        with pytest.raises(SpeculatorError, match=complaint) as refusal:
            VLLMPipeline(plan, schema_of(plan))
    assert "\n" not in str(refusal.value)
