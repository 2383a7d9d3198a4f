"""Servers over HTTP: a small stand-in for what goes wrong on the wire, and one real server."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks import playground
from benchmarks.acceptance.live import read_counters
from benchmarks.acceptance.measurement import measure
from benchmarks.acceptance.report import print_report, write_report
from benchmarks.acceptance.settings import AcceptanceConfig, ServerConfig
from benchmarks.acceptance.statistics import latency, tokens_per_second
from speculators_core.cli import main
from speculators_core.console import console
from speculators_core.diagnosis.acceptance_report import RequestRecord, Timing
from speculators_core.errors import SpeculatorError
from tests.vllm.serving import server

VERIFIER = str(playground.VERIFIER)
K = 3
KEPT = (0, 2, 3, 0, 1)
"""Tokens that the stand-in keeps of each draft, over and over."""
POSITIONS = "vllm:spec_decode_num_accepted_tokens_per_pos_total"


class StandIn:
    """Answers as vLLM does; its fields say what it does otherwise."""

    def __init__(self):
        self.version, self.root, self.max_model_len = "0.32.0", VERIFIER, 2048
        self.speculates, self.detail, self.caches = True, "detailed", True
        self.key: str | None = None
        self.pages: dict[str, tuple[int, str]] = {}
        """Path to another status and text than usual."""
        self.broken = lambda number: None
        """Request number to what its answer is instead, in place of the last event but one."""
        self.step_s, self.counts_after_s, self.shift, self.padding = 0.0, 0.0, 0, 0
        self.bodies: list[dict] = []
        self.tokens, self.drafts = 1000, 50
        self.asked_of_cache = self.cached = 0
        self.kept = [30, 20, 10]
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def events(self, prompt, max_tokens):
        """Chunks of token ids, and what was kept of each draft."""
        ids = [(sum(prompt) + self.shift + i) % 2000 for i in range(max_tokens)]
        chunks, accepted = [ids[:1]], []
        while sum(map(len, chunks)) < max_tokens:
            kept = KEPT[len(accepted) % len(KEPT)] if self.speculates else 0
            accepted.append(kept)
            start = sum(map(len, chunks))
            chunks.append(ids[start : start + kept + 1])
        return chunks, accepted if self.speculates else []

    def count(self, num_tokens, accepted):
        def later():
            with self.lock:
                self.tokens += num_tokens
                self.drafts += len(accepted)
                for position in range(K):
                    self.kept[position] += sum(a > position for a in accepted)

        threading.Timer(self.counts_after_s, later).start() if self.counts_after_s else later()

    def metrics(self):
        lines = [
            f'vllm:cache_config_info{{enable_prefix_caching="{self.caches}",engine="0"}} 1.0',
            f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}.0',
            f'vllm:prefix_cache_queries_total{{engine="0"}} {self.asked_of_cache}.0',
            f'vllm:prefix_cache_hits_total{{engine="0"}} {self.cached}.0',
        ]
        if self.speculates:
            lines.append(f'vllm:spec_decode_num_drafts_total{{engine="0"}} {self.drafts}.0')
            lines += [
                f'{POSITIONS}{{engine="0",position="{p}"}} {self.kept[p]}.0' for p in range(K)
            ]
        return "\n".join(lines) + "\n"

    def drafts_of(self, accepted):
        if not self.speculates or self.detail == "none":
            return {}
        histogram = [accepted.count(k) for k in range(K + 1)]
        found = {"acceptance_histogram": histogram, "num_spec_tokens": K}
        if self.detail == "detailed":
            found["per_step_accepted"] = accepted
        return {"metrics": {"speculative_decoding": found}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        stand_in = self.server.stand_in
        model = {"id": "served", "root": stand_in.root, "max_model_len": stand_in.max_model_len}
        adapter = {**model, "id": "adapter", "parent": "served"}
        usual = {
            "/version": json.dumps({"version": stand_in.version}),
            "/v1/models": json.dumps({"data": [adapter, model]}),
            "/metrics": stand_in.metrics(),
        }
        status, text = stand_in.pages.get(self.path, (200, usual[self.path]))
        if self.path.startswith("/v1") and stand_in.key:
            if self.headers["Authorization"] != f"Bearer {stand_in.key}":
                status, text = 401, '{"error":"Unauthorized"}'
        self.answer(status, text)

    def answer(self, status, text):
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/version")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        stand_in = self.server.stand_in
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stand_in.lock:
            stand_in.bodies.append(body)
            number = len(stand_in.bodies)
            stand_in.in_flight += 1
            stand_in.most_in_flight = max(stand_in.most_in_flight, stand_in.in_flight)
        try:
            broken = stand_in.broken(number)
            if isinstance(broken, int):
                return self.answer(broken, '{"error":{"message":"out of memory"}}')
            self.stream(stand_in, body, broken)
        finally:
            with stand_in.lock:
                stand_in.in_flight -= 1

    def stream(self, stand_in, body, broken):
        chunks, accepted = stand_in.events(body["prompt"], body["max_tokens"])
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for index, ids in enumerate(chunks):
            time.sleep(stand_in.step_s)
            last = index + 1 == len(chunks)
            choice = {"token_ids": ids, "finish_reason": "length" if last else None}
            if index == 0:
                choice["prompt_token_ids"] = body["prompt"]
            if last and broken is not None:
                if broken == "silence":
                    time.sleep(4)
                if broken in ("silence", "disconnect"):
                    self.close_connection = True
                    return
                self.send(broken)
                continue
            self.send(json.dumps({"choices": [choice], "text": "x" * stand_in.padding}))
        stand_in.count(sum(map(len, chunks)), accepted)
        self.send(json.dumps({"choices": [], **stand_in.drafts_of(accepted)}))
        self.send("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def send(self, event):
        data = f"data: {event}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


@contextmanager
def standing_in(**fields):
    stand_in = StandIn()
    for name, value in fields.items():
        assert hasattr(stand_in, name)
        setattr(stand_in, name, value)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.stand_in = stand_in
    server.handle_error = lambda *_: None  # the other side hung up
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield stand_in, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def served():
    with standing_in() as both:
        yield both


def settings(url, baseline=None, **options):
    server = {"base_url": url, "baseline_url": baseline}
    server |= {k: options.pop(k) for k in ("api_key", "timeout_s") if k in options}
    common = {"limit_per_category": 1, "max_tokens": 24}
    return AcceptanceConfig(**common | options, server=ServerConfig(**server))


def test_counts_speeds_and_prompts_of_a_server(served, tmp_path):
    stand_in, url = served
    step_s = stand_in.step_s = 0.05  # long enough for two requests to meet on a busy machine
    report = measure(settings(url, concurrency=2, runs=2))
    (draft,) = report.drafts
    (entry,) = draft.by_k
    _, accepted = stand_in.events([1], 24)
    assert draft.kind == "served" and draft.name == url.removeprefix("http://")
    assert [r.accepted for r in entry.requests] == [accepted] * 8
    assert (entry.speculative_tokens, entry.counted) == (K, "by request")
    assert entry.pooled.num_drafts == 8 * len(accepted) == entry.counters.num_drafts
    assert stand_in.most_in_flight == 2
    num_steps = 1 + len(accepted)
    waits = entry.latency
    assert waits.first_token_s["p50"] >= step_s
    assert all(step_s <= r.timing.first_token_s < r.seconds for r in entry.requests)
    # Two at a time, four a run: a run lasts as long as two requests after one another, or longer.
    assert entry.tokens_per_s[0] <= 24 * 4 / (2 * step_s * num_steps)
    assert waits.tokens_per_s_per_user <= 24 / (step_s * num_steps)
    sent = stand_in.bodies[1:5]
    assert {len(body["prompt"]) for body in sent} == {
        r.num_prompt_tokens for r in entry.requests[:4]
    }
    assert sent[0]["model"] == "served"
    # A server would take these from the verifier's generation_config.json.
    plain = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    assert plain.items() <= sent[0].items()
    assert report.remarks == [
        "drafts are counted by request, as the server reports with each answer"
    ]
    write_report(report, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["servers"]["speculating"]["version"] == "0.32.0"
    assert written["servers"]["speculating"]["url"] == url
    assert written["settings"]["engine"] == "server"
    assert "client device" in written["environment"]
    requests = written["drafts"][0]["by_k"][0]["requests"]
    ends = [r["timing"]["start_s"] + r["seconds"] for r in requests[:4]]
    assert entry.tokens_per_s[0] == pytest.approx(
        24 * 4 / (max(ends) - min(r["timing"]["start_s"] for r in requests[:4]))
    )


def test_every_way_of_counting_gives_the_same_counts():
    found = {}
    for detail in ("detailed", "summary", "none"):
        with standing_in(detail=detail) as (_, url):
            report = measure(settings(url))
        found[detail] = report.drafts[0].by_k[0]
    assert found["detailed"].pooled == found["summary"].pooled == found["none"].pooled
    assert found["detailed"].pooled.num_drafts > 0
    assert found["detailed"].interval_95 == found["summary"].interval_95
    contexts = found["detailed"].contexts
    assert sum(part.num_drafts for part in contexts.values()) == found["none"].pooled.num_drafts
    assert found["summary"].contexts == found["none"].contexts == {}  # in which order is unknown
    by_server = found["none"]
    assert by_server.counted == "by server"
    assert by_server.interval_95 is by_server.macro_acceptance_length is None
    assert by_server.categories == {}
    assert "for all requests together" in report.remarks[0]
    with console.capture() as shown:
        print_report(report)
    row = next(line for line in shown.get().splitlines() if "127.0.0.1" in line)
    assert f"{by_server.pooled.acceptance_length:.3f}" in row
    assert row.count(" - ") == 5  # interval, macro, loop-free, speed-up, identical


def test_somebody_elses_requests_are_noticed(served):
    stand_in, url = served
    count = stand_in.count
    stand_in.count = lambda num_tokens, accepted: count(num_tokens + 5, accepted)
    report = measure(settings(url))
    (remark,) = [r for r in report.remarks if "somebody else" in r]
    assert "counted +20 tokens in addition to these 4 requests" in remark


def test_late_counters_are_waited_for(served):
    stand_in, url = served
    stand_in.counts_after_s, stand_in.detail = 0.3, "none"
    report = measure(settings(url))
    assert not [r for r in report.remarks if "somebody else" in r]
    assert report.drafts[0].by_k[0].pooled.num_drafts == 4 * len(stand_in.events([1], 24)[1])


def test_prefix_cache_hits_are_stated(served):
    stand_in, url = served

    def hit(number):
        if number == 2:  # the first after the warm-up
            stand_in.asked_of_cache, stand_in.cached = 100, 25

    stand_in.broken = hit
    report = measure(settings(url))
    assert report.remarks[1] == "25.0% of prompt tokens with speculation came from the prefix cache"


def test_speed_up_and_outputs_are_against_the_baseline_server(served):
    stand_in, url = served
    with standing_in(speculates=False, step_s=0.01) as (_, baseline):
        report = measure(settings(url, baseline))
    (entry,) = report.drafts[0].by_k
    assert entry.num_identical == 4
    assert entry.speed_up == pytest.approx(entry.tokens_per_s[0] / report.baseline_tokens_per_s[0])
    assert entry.speed_up > 1  # it sleeps for each token, the other never
    assert report.baseline_latency.per_token_s["p50"] >= 0.01
    assert report.servers["baseline"]["url"] == baseline
    with standing_in(speculates=False, shift=1) as (_, baseline):
        report = measure(settings(url, baseline))
    assert report.drafts[0].by_k[0].num_identical == 0
    assert report.drafts[0].by_k[0].first_differences == {0: 0, 1: 0, 2: 0, 3: 0}


def test_without_a_baseline_there_is_no_speed_up(served):
    report = measure(settings(served[1]))
    (entry,) = report.drafts[0].by_k
    assert entry.speed_up is entry.num_identical is None
    assert report.baseline_requests == report.baseline_tokens_per_s == []
    with console.capture() as shown:
        print_report(report)
    assert "none" not in shown.get()


def test_key_is_sent_and_never_written(served, monkeypatch, tmp_path):
    stand_in, url = served
    stand_in.key = "sesame"
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    with pytest.raises(SpeculatorError, match="HTTP 401: .* Pass the server's key as --api-key"):
        measure(settings(url))
    given = settings(url, api_key="sesame")
    assert "sesame" not in repr(given)
    report = measure(given)
    write_report(report, tmp_path)
    assert "sesame" not in (tmp_path / "report.json").read_text()
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    measure(settings(url))


def test_model_names_what_the_server_runs(served):
    report = measure(settings(served[1], model=(str(playground.EAGLE3),)))
    assert report.drafts[0].short_name == "eagle3"
    assert report.drafts[0].sha256 is not None


def test_server_started_with_a_speculator_has_the_verifier_that_it_names(served):
    stand_in, url = served
    stand_in.root = str(playground.EAGLE3)
    assert Path(measure(settings(url)).verifier).samefile(VERIFIER)


def test_lines_longer_than_any_buffer_are_read(served):
    stand_in, url = served
    stand_in.padding = 300_000
    report = measure(settings(url, max_tokens=4))
    assert all(len(r.output_ids) == 4 for r in report.drafts[0].by_k[0].requests)


def test_no_more_tokens_are_asked_for_than_the_server_has_room_for(served):
    stand_in, url = served
    stand_in.max_model_len = 300
    measure(settings(url, max_tokens=400))
    for body in stand_in.bodies[1:]:
        assert len(body["prompt"]) + body["max_tokens"] == 300


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (500, "prompt 2 at .*: HTTP 500: .*out of memory"),
        ("disconnect", "prompt 2 at .*: "),
        ("silence", "prompt 2 at .*: no answer in time .*--timeout-s"),
        ("{not json", "prompt 2 at .*: not an answer of a vLLM server: Invalid JSON"),
        ('{"choices": [{"text": "no ids"}]}', "prompt 2 .*choices.0.token_ids: Field required"),
        ('{"error": {"message": "engine died"}}', "prompt 2 at .*engine died"),
        ("[DONE]", r"prompt 2 at .*: the answer broke off after \d+ tokens"),
        (
            '{"choices": [{"token_ids": [1], "prompt_token_ids": [1]}]}',
            "prompt 2 .* changed the prompt",
        ),
    ],
)
def test_a_request_that_fails_ends_the_run_and_is_named(served, broken, message):
    stand_in, url = served
    stand_in.broken = lambda number: broken if number == 3 else None  # the warm-up is the first
    with pytest.raises(SpeculatorError, match=message) as failure:
        measure(settings(url, timeout_s=2.0 if broken == "silence" else 30.0))
    assert "\n" not in str(failure.value)
    assert len(stand_in.bodies) == 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "localhost:8000: expected a server as http://host:port"),
        ("http://localhost:8000/v1", "without a path"),
        ("http://localhost:eight", "expected a server as http://host:port"),
        ("http://", "expected a server as http://host:port"),
        ("http://me:secret@localhost:8000", "holds credentials, which a report would show"),
        ("http://127.0.0.1:9", "127.0.0.1:9/version: Connection refused"),
    ],
)
def test_wrong_urls_are_one_line(url, message, capsys):
    with pytest.raises(SystemExit) as leave:
        main(["acceptance", "--base-url", url])
    assert leave.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "secret" not in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speculates": False}, "counts no drafts at /metrics. Start it with --speculative-config"),
        ({"pages": {"/version": (404, "nothing")}}, "HTTP 404: nothing Expected a vLLM server"),
        (
            {"pages": {"/version": (200, "<html>")}},
            "/version: not an answer of a vLLM server: Invalid JSON",
        ),
        (
            {"pages": {"/v1/models": (200, '{"data": []}')}},
            "/v1/models: not an answer of a vLLM server: data",
        ),
        ({"pages": {"/metrics": (302, "")}}, "/metrics: HTTP 302"),
        ({"root": "/models/elsewhere"}, "not within reach here .*Pass --verifier"),
    ],
)
def test_servers_that_cannot_be_measured_are_refused_before_any_request(fields, message):
    with standing_in(**fields) as (stand_in, url):
        with pytest.raises(SpeculatorError, match=message):
            measure(settings(url))
        assert stand_in.bodies == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speculates": True}, "speculates; expected a server without"),
        ({"version": "0.31.0"}, "version is 0.32.0 at .* and 0.31.0 at"),
        ({"caches": False}, "has_prefix_cache is True at .* and False at"),
        ({"root": str(playground.EAGLE3.parent)}, "Pass --verifier"),
    ],
)
def test_a_baseline_that_differs_in_more_than_speculation_is_refused(served, fields, message):
    with standing_in(**{"speculates": False} | fields) as (_, baseline):
        with pytest.raises(SpeculatorError, match=message):
            measure(settings(served[1], baseline))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (2,)}, "--k: decided by the server at --base-url"),
        (
            {"dtype": "float32", "engine_args": {"a": 1}},
            "--dtype, --engine-args: decided by the",
        ),
        ({"engine": "transformers"}, "--engine transformers: decided by the server"),
        ({"model": ("a", "b")}, "serves one draft, found 2 names"),
        ({"url": None, "baseline": "http://x"}, "--baseline-url belongs to a server. Pass"),
        (
            {"url": None, "api_key": "x"},
            "--api-key belongs to a server. Pass its URL as",
        ),
    ],
)
def test_options_that_a_server_decides_are_refused(options, message):
    with pytest.raises(SpeculatorError, match=message):
        measure(settings(**{"url": "http://127.0.0.1:9"} | options))


def test_counters_of_all_engines_are_added():
    lines = [
        f'{POSITIONS}{{engine="{engine}",model_name="a {{}} b",position="{position}"}} {value}'
        for engine, position, value in [(0, 0, 5.0), (0, 1, 2.0), (1, 0, 4.0), (1, 1, "1e+02")]
    ]
    lines += [f'vllm:spec_decode_num_drafts_total{{engine="{engine}"}} 7.0' for engine in (0, 1)]
    lines.append(f'{POSITIONS.replace("_total", "_created")}{{engine="0",position="0"}} 1.7e9')
    found = read_counters("\n".join(lines))
    assert found.accepted_per_position == (9, 102)
    assert found.num_drafts == 14
    assert read_counters("nothing").accepted_per_position == ()


def test_rates_and_waits_of_a_hand_counted_case():
    def request(start, first, seconds, num_tokens):
        return RequestRecord(
            category="a",
            num_prompt_tokens=1,
            output_ids=list(range(num_tokens)),
            accepted=[],
            seconds=seconds,
            timing=Timing(start_s=start, first_token_s=first),
        )

    records = [request(1.0, 1.0, 4.0, 4), request(2.0, 0.5, 4.0, 8), request(2.5, 0.5, 0.5, 1)]
    assert tokens_per_second(records) == 13 / 5  # from 1.0 to 6.0
    found = latency(records)
    assert found.first_token_s == {"p50": 0.5, "p90": 1.0, "p99": 1.0}
    assert found.per_token_s == {"p50": 0.5, "p90": 1.0, "p99": 1.0}  # one has no second token
    assert found.tokens_per_s_per_user == 2.0
    assert latency([records[0].model_copy(update={"timing": None})]) is None


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_server_gives_what_the_engine_in_this_process_gives(tmp_path):
    """Started as ``vllm serve <speculator>``; its verifier lies beside it."""
    common = {"limit_per_category": 1, "max_tokens": 32}
    arguments = [str(playground.EAGLE3), "--max-model-len", "512"]
    arguments += ["--per-request-spec-decode-metrics", "detailed"]
    with server(tmp_path / "log", *arguments) as url:
        report = measure(settings(url, **common))
    here = measure(
        AcceptanceConfig(
            model=(str(playground.EAGLE3),), engine_args={"max_model_len": 512}, **common
        )
    )
    (over_http,), (in_process,) = report.drafts[0].by_k, here.drafts[0].by_k
    assert report.prompts_sha256 == here.prompts_sha256
    assert in_process.pooled.num_drafts > 0
    for ours, theirs in zip(over_http.requests, in_process.requests, strict=True):
        assert ours.output_ids == theirs.output_ids
        assert ours.accepted == theirs.accepted
    assert over_http.contexts == in_process.contexts
    counted = over_http.counters
    assert counted.num_drafts == over_http.pooled.num_drafts
    assert list(counted.accepted_per_position) == over_http.pooled.accepted_per_position
    assert counted.generation_tokens == sum(len(r.output_ids) for r in over_http.requests)
    assert over_http.latency.first_token_s["p50"] > 0
