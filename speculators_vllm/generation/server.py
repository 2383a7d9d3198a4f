"""A vLLM server that somebody started to hand out hidden states, asked over HTTP.

Its answers say where states are: in a file that both see, or on their way to an endpoint of ours.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from speculators_core.data_generation.examples import Example
from speculators_core.data_generation.settings import EngineConfig
from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.files import Roots
from speculators_vllm.generation.arrivals import Arrivals, Inbox, Outcome
from speculators_vllm.generation.requests import OptionsOf, RequestOptions
from speculators_vllm.hidden_states.files import read_hidden_states
from speculators_vllm.hidden_states.settings import ENDPOINT

Page = TypeVar("Page", bound=BaseModel)
CONCURRENCY = 64
"""Requests at one time where `engine.batch_size` does not say."""
CONNECT_WITHIN_S = 10.0
ANSWER_WITHIN_S = 600.0
MAX_PAGE_BYTES = 2**24
SHOWN_CHARACTERS = 200


class _Model(BaseModel):
    id: str
    max_model_len: int
    parent: str | None = None
    """Of an adapter."""


class _Models(BaseModel):
    data: list[_Model] = Field(min_length=1)


class _Place(BaseModel):
    """Of a request's states."""

    error: str | None = None
    hidden_states_path: Path | None = None
    hidden_states_endpoint: str | None = Field(None, pattern=ENDPOINT)


class _Choice(BaseModel):
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    kv_transfer_params: _Place | None = None


class Server:
    """One model of a server, and the ways in which its states come."""

    def __init__(
        self, engine: EngineConfig, allowed_roots: tuple[Path, ...], max_frame_bytes: int
    ) -> None:
        """Raises:
        SpeculatorError: the server is not within reach, wants a key, or is not vLLM; or the plan
            has options that are the server's.
        """
        import httpx

        assert engine.base_url is not None
        self.url = engine.base_url.rstrip("/").removesuffix("/v1")
        for name, stated in (("vllm", engine.vllm), ("device", engine.device)):
            if stated:
                raise SpeculatorError(f"engine.{name}: the server at {self.url} decides it itself.")
        self._roots = Roots(allowed_roots)
        self._max_frame_bytes = max_frame_bytes
        self._concurrency = engine.batch_size or CONCURRENCY
        self._inbox: Inbox | None = None
        self._lock = threading.Lock()
        key = (engine.api_key or os.environ.get("OPENAI_API_KEY", "")).strip()
        with self._failures():
            self._client = httpx.Client(
                headers={"Authorization": f"Bearer {key}"} if key else None,
                timeout=httpx.Timeout(ANSWER_WITHIN_S, connect=CONNECT_WITHIN_S, pool=None),
                limits=httpx.Limits(max_connections=self._concurrency),
                trust_env=False,
            )
        models = self._ask(_Models, "GET", "/v1/models").data
        self._model = next((model for model in models if model.parent is None), models[0])

    def run(self, arrivals: Arrivals, options_of: OptionsOf) -> dict[str, Outcome]:
        """Raises:
        SpeculatorError: the server does not answer, or not as one that hands out states.
        """
        if self._inbox is not None:
            self._inbox.arrivals = arrivals

        def complete(name: str) -> None:
            try:
                if not arrivals.has_ended:
                    example = arrivals.examples[name]
                    self._complete(arrivals, name, example, options_of(name, example))
            except SpeculatorError as error:
                arrivals.end(error)

        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="ask") as threads:
            list(threads.map(complete, arrivals.examples))
        return arrivals.wait()

    def _complete(
        self, arrivals: Arrivals, name: str, example: Example, options: RequestOptions
    ) -> None:
        room = self._model.max_model_len - len(example.input_ids)
        body = {
            "model": self._model.id,
            "prompt": example.input_ids.tolist(),
            **options.sampling,
            "max_tokens": max(1, min(options.sampling["max_tokens"], room)),
            "kv_transfer_params": options.kv_transfer_params,
        }
        try:
            answer = self._ask(_Completion, "POST", "/v1/completions", body)
        except _Refused as error:
            arrivals.failed(name, str(error))
            return
        place = answer.kv_transfer_params or _Place()
        if place.error is not None:
            arrivals.failed(name, place.error)
        elif answer.choices[0].finish_reason not in ("stop", "length"):
            arrivals.failed(name, f"{self.url} ended it: {answer.choices[0].finish_reason}")
        elif place.hidden_states_path is not None:
            self._take_file(arrivals, name, place.hidden_states_path)
        elif place.hidden_states_endpoint is not None:
            self._listen(arrivals, place.hidden_states_endpoint)
        else:
            raise SpeculatorError(
                f"{self.url} hands out no hidden states. Start it with the --speculative-config "
                "and --kv-transfer-config of hidden_states.settings.engine_arguments."
            )

    def _take_file(self, arrivals: Arrivals, name: str, stated: Path) -> None:
        """Reads the file, which is then gone."""
        path = self._roots.check(stated)
        if path.name != f"{name}.safetensors":
            raise SpeculatorError(f"{self.url} points to {stated} for the request {name}.")
        try:
            states = read_hidden_states({"name": name, "hidden_states_path": path})
            path.unlink()
        except OSError as error:
            raise SpeculatorError(f"{path} cannot be removed: {first_line(error)}.") from error
        except SpeculatorError as error:
            arrivals.failed(name, str(error))
            return
        arrivals.arrived(states)

    def _listen(self, arrivals: Arrivals, endpoint: str) -> None:
        """States wait in the server until somebody is bound to its endpoint."""
        with self._lock:
            if self._inbox is None:
                kind, _, address = endpoint.partition("://")
                if kind == "ipc":  # binding replaces the file
                    self._roots.check(address)
                self._inbox = Inbox(endpoint, self._max_frame_bytes)
                self._inbox.arrivals = arrivals
            elif self._inbox.endpoint != endpoint:
                raise SpeculatorError(
                    f"{self.url} sends states to {endpoint} and to {self._inbox.endpoint}; "
                    "expected one endpoint."
                )

    def _ask(self, kind: type[Page], method: str, path: str, body: Any = None) -> Page:
        where = f"{self.url}{path}"
        with self._failures(), self._client.stream(method, where, json=body) as reply:
            page = bytearray()
            for piece in reply.iter_bytes():
                page += piece
                if len(page) > MAX_PAGE_BYTES:
                    raise SpeculatorError(f"{where}: an answer of over {MAX_PAGE_BYTES} bytes.")
        if reply.status_code != 200:
            raise _refusal(where, reply.status_code, bytes(page))
        try:
            return kind.model_validate_json(page)
        except ValidationError as error:
            raise SpeculatorError(f"{where}: no answer of vLLM's: {first_fault(error)}") from error

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What the network does wrong becomes one line."""
        import httpx

        try:
            yield
        except httpx.TimeoutException as error:
            raise SpeculatorError(
                f"{self.url} gave no answer in time ({type(error).__name__}): it has "
                f"{CONNECT_WITHIN_S:.0f} s to take a call and {ANSWER_WITHIN_S:.0f} s to answer."
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SpeculatorError(f"{self.url}: {first_line(error)}.") from error

    def close(self) -> None:
        self._client.close()
        if self._inbox is not None:
            self._inbox.close()


class _Refused(SpeculatorError):
    """The request is at fault, not the server."""


def _refusal(where: str, status: int, page: bytes) -> SpeculatorError:
    line = " ".join(page.decode("utf-8", "replace").split())
    shown = line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."
    hint = {
        401: " Pass the server's key as engine.api_key.",
        404: " Expected a vLLM server, which has this.",
    }.get(status, "")
    kind = _Refused if status == 400 else SpeculatorError
    return kind(f"{where}: HTTP {status}: {shown}{hint}")
