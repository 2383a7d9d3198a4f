"""A small server that speaks OpenAI's protocol, and what tests regenerate with it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from speculators_core.data_generation.answers.regenerate import (
    RegenerateConfig,
    RegenerateReport,
    regenerate,
)
from speculators_core.data_generation.settings import DatasetConfig

Reply = tuple[int, Any]
"""Status and page; None hangs up."""


def says(content: str | None, finish: str = "stop", **message: Any) -> Reply:
    choice = {"message": {"content": content, **message}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": {"completion_tokens": 3}}


def echo(body: dict[str, Any]) -> Reply:
    """Depends on every message before."""
    return says(f"{len(body['messages'])}:{body['messages'][-1]['content']}")


def last(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


class ChatServer:
    """Answers with ``reply`` of a request's body, and remembers what it was asked."""

    def __init__(self, reply: Callable[[dict[str, Any]], Reply | None]) -> None:
        self.reply = reply
        self.models = ["tiny"]
        self.delay_s = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                assert self.path == "/v1/models"
                self._send((200, {"data": [{"id": name} for name in owner.models]}))

            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._send(owner._answer(body, dict(self.headers)))

            def _send(self, reply: Reply | None) -> None:
                if reply is None:
                    self.close_connection = True
                    return
                page = json.dumps(reply[1]).encode()
                self.send_response(reply[0])
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def _answer(self, body: dict[str, Any], headers: dict[str, str]) -> Reply | None:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay_s)
            return self.reply(body)
        finally:
            with self._lock:
                self._at_once -= 1


@contextmanager
def chat_server(reply: Callable[[dict[str, Any]], Reply | None] = echo) -> Iterator[ChatServer]:
    server = ChatServer(reply)
    threading.Thread(target=server._http.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server._http.shutdown()
        server._http.server_close()


class Run:
    """Regenerates rows in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.output = folder / "answers.jsonl"

    def write(self, rows, name="rows.jsonl"):
        path = self.folder / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    def settings(self, url=None, data=(), **options) -> tuple[DatasetConfig, RegenerateConfig]:
        sections: dict[str, dict[str, Any]] = {"sampling": {}, "endpoint": {}, "offline": {}}
        if url is not None:
            sections["endpoint"]["base_url"] = url
        for name, section in SECTIONS.items():
            sections[section] |= {name: options.pop(name)} if name in options else {}
        answers = {key: options.pop(key) for key in ("engine", "verifier") if key in options}
        content = {"output": self.output, "allowed_roots": [self.folder], **options}
        dataset = {"path": str(self.folder / "rows.jsonl"), **dict(data)}
        return (
            DatasetConfig.model_validate(dataset),
            RegenerateConfig.model_validate(content | {"answers": answers | sections}),
        )

    def __call__(self, rows=None, url=None, **options) -> RegenerateReport:
        if rows is not None:
            self.write(rows)
        return regenerate(*self.settings(url, **options))

    def lines(self, what=""):
        text = self.output.with_name(self.output.name + what).read_text()
        return [json.loads(line) for line in text.splitlines()]

    def aside(self):
        return {line["key"]: line["reason"] for line in self.lines(".set_aside.jsonl")}


SECTIONS = {
    name: section
    for section, fields in {
        "sampling": "temperature top_p top_k max_tokens seed template_options",
        "endpoint": "model api_key concurrency retries timeout_s",
        "offline": "engine_args dtype batch_size reasoning_parser tool_call_parser",
    }.items()
    for name in fields.split()
}
