"""One client of servers: what it asks again, how far it reads, and what its errors say."""

import asyncio
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import BaseModel

from speculators_core import http
from speculators_core.errors import SpeculatorError
from speculators_core.http import Access, BlockingClient, Client, Models, Refused, VLLMModels

MODELS = (
    b'{"data": [{"id": "a", "max_model_len": 9, "parent": "b"}, {"id": "b", "max_model_len": 9}]}'
)


class Nothing(BaseModel):
    nothing_has_this: int


@contextmanager
def serving(*answers):
    """Answers requests by ``answers`` in order, the last one again; None hangs up."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            answer = answers[min(len(asked), len(answers) - 1)]
            length = int(self.headers.get("Content-Length", 0))
            asked.append((self.command, self.path, self.rfile.read(length)))
            if answer is None:
                self.close_connection = True
                return
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        do_POST = do_GET

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def access(url, **options):
    return Access(**{"url": url, "api_key": None, "timeout_s": 5.0} | options)


def ask(url, kind=Models, path="/v1/models", body=None, **options):
    async def once():
        async with Client(access(url, **options)) as client:
            return await client.ask(kind, path, body)

    return asyncio.run(once())


def events(url):
    async def all_of_them():
        async with Client(access(url)) as client:
            return [event async for event in client.events("/stream", {})]

    return asyncio.run(all_of_them())


def test_a_page_becomes_a_record():
    with serving((200, MODELS)) as (url, asked):
        assert [model.id for model in ask(url).data] == ["a", "b"]
        assert ask(url, VLLMModels).base.id == "b"
        ask(url, body={"x": 1})
    assert asked[0] == ("GET", "/v1/models", b"")
    assert asked[2] == ("POST", "/v1/models", b'{"x":1}')


@pytest.mark.parametrize("status", http.BUSY)
def test_a_busy_server_is_asked_as_often_as_allowed(status):
    with serving((status, b"no"), None, (200, MODELS)) as (url, asked):
        ask(url, retries=2)
        assert len(asked) == 3
    with serving((status, b"no")) as (url, asked):
        with pytest.raises(Refused, match=f"/v1/models: HTTP {status}: no") as refusal:
            ask(url, retries=1)
        assert len(asked) == 2 and refusal.value.status == status


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 307])
def test_other_refusals_are_final(status):
    with serving((status, b"no")) as (url, asked):
        with pytest.raises(Refused) as refusal:
            ask(url, retries=9)
    assert len(asked) == 1
    assert refusal.value.is_request_at_fault == (status in (400, 413, 422))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, b"no"), "HTTP 401: no Pass the server's key as --key."),
        ((404, b""), "HTTP 404:  Expected a cat, which has this."),
        ((500, b"of\nsk-1 " + 300 * b"x"), r"HTTP 500: of \*\*\* x+\.\.\."),
        ((200, b"<html>"), "/v1/models: not an answer of a cat: Invalid JSON"),
        ((200, b" " * 2000), "/v1/models: an answer of over 1000 bytes."),
        (None, "/v1/models: Server disconnected"),
    ],
)
def test_failures_are_one_line_that_names_the_address(answer, message, monkeypatch):
    monkeypatch.setattr(http, "MAX_PAGE_BYTES", 1000)
    with serving(answer) as (url, _), pytest.raises(SpeculatorError, match=message) as failure:
        ask(url, api_key="sk-1", key_option="--key", expected="a cat")
    assert str(failure.value).startswith(url)
    assert "\n" not in str(failure.value) and "sk-1" not in str(failure.value)


def test_nobody_there_is_said_as_the_system_says_it():
    with pytest.raises(SpeculatorError, match="http://127.0.0.1:9/v1/models: Connection refused"):
        ask("http://127.0.0.1:9")
    with pytest.raises(SpeculatorError, match="Invalid port"):
        ask("http://[:x")


def test_events_are_given_whole_up_to_the_end(monkeypatch):
    long = b'"' + "\u2028".encode() + 50_000 * b"x" + b'"'
    stream = b": a comment\n\ndata: 1\r\n\r\ndata:" + long + b"\nevent: x\ndata: [DONE]\ndata: 3\n"
    with serving((200, stream)) as (url, asked):
        assert events(url) == [b"1", long]
        assert asked == [("POST", "/stream", b"{}")]
    monkeypatch.setattr(http, "MAX_PAGE_BYTES", 1000)
    with serving((200, stream)) as (url, _), pytest.raises(SpeculatorError, match="over 1000 byte"):
        events(url)


def test_threads_ask_without_an_event_loop():
    with serving((200, MODELS)) as (url, asked):
        client = BlockingClient(access(url))
        try:
            ask = [
                threading.Thread(target=client.ask, args=(Models, "/v1/models")) for _ in range(8)
            ]
            for thread in ask:
                thread.start()
            for thread in ask:
                thread.join()
            with pytest.raises(SpeculatorError, match="/nothing: not an answer"):
                client.ask(Nothing, "/nothing")
        finally:
            client.close()
    assert len(asked) == 9
