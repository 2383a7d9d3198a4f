"""The one client of vLLM's and OpenAI-compatible servers."""

import asyncio
import itertools
import os
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, Field, ValidationError

from speculators_core.errors import SpeculatorError, first_fault, first_line

Page = TypeVar("Page", bound=BaseModel)
Result = TypeVar("Result")
CONNECT_WITHIN_S = 10.0
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
MAX_PAGE_BYTES = 2**24
"""Longest answer, or longest line of a streamed one."""
SHOWN_CHARACTERS = 200
"""Of a server's answer in an error."""
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which a request is repeated."""


class Model(BaseModel):
    """A model that a server lists."""

    id: str
    """The name that requests carry."""


class VLLMModel(Model):
    """The same with what vLLM adds."""

    max_model_len: int
    root: str | None = None
    """Folder or hub id that the name stands for."""
    parent: str | None = None
    """Base model of an adapter."""


class Models(BaseModel):
    """The page `/v1/models`."""

    data: tuple[Model, ...] = Field(min_length=1)


class VLLMModels(BaseModel):
    """The same of a vLLM server."""

    data: tuple[VLLMModel, ...] = Field(min_length=1)

    @property
    def base(self) -> VLLMModel:
        """The first model that is not an adapter."""
        return next((model for model in self.data if model.parent is None), self.data[0])


class Unreachable(SpeculatorError):
    """The network failed, or the server was silent for too long."""


class Refused(SpeculatorError):
    """The server answered with another status than 200."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_request_at_fault(self) -> bool:
        """Whether the server works and only this request is wrong."""
        return self.status in (400, 413, 422)


@dataclass(frozen=True)
class Access:
    """How a server is asked."""

    url: str
    """Common start of all addresses."""
    api_key: str | None
    """The environment variable OPENAI_API_KEY is used where there is none."""
    timeout_s: float
    """Longest silence of the server."""
    connections: int | None = None
    """Bound on concurrent requests; None for no bound."""
    retries: int = 0
    """Further attempts while the server is busy, broken or silent."""
    uses_proxy: bool = False
    """Whether the proxy that the environment names is used."""
    expected: str = "a vLLM server"
    """What should be there, for errors."""
    key_option: str = "--api-key"
    """Where the user sets the key, for errors."""
    timeout_option: str | None = "--timeout-s"
    """Where the user sets the time, for errors; None where it is fixed."""

    @property
    def key(self) -> str:
        return (self.api_key or os.environ.get("OPENAI_API_KEY", "")).strip()

    @property
    def connect_within_s(self) -> float:
        return min(CONNECT_WITHIN_S, self.timeout_s)


class Client:
    """Asks one server, many requests at a time; every failure is one line that names the URL."""

    def __init__(self, access: Access) -> None:
        """Raises:
        SpeculatorError: the environment names a proxy that is not a valid URL.
        """
        self.access = access
        with self._failures(access.url):
            self._client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {access.key}"} if access.key else None,
                timeout=httpx.Timeout(access.timeout_s, connect=access.connect_within_s, pool=None),
                limits=httpx.Limits(max_connections=access.connections),
                trust_env=access.uses_proxy,
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, kind: type[Page], path: str, body: Mapping[str, Any] | None = None) -> Page:
        """The page at a path as a record; with a ``body`` by POST.

        Raises:
            Refused: the status is not 200, after all retries.
            Unreachable: there is no answer, after all retries.
            SpeculatorError: the answer is too long or not such a record, or the URL is invalid.
        """
        return self.parse(kind, await self.read(path, body), path)

    async def read(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The page at a path as it is; raises as `ask`."""
        for attempt in itertools.count():
            try:
                async with self._opened(path, body) as reply:
                    return await self._page(reply, path)
            except (Refused, Unreachable) as error:
                is_passing = isinstance(error, Unreachable) or error.status in BUSY
                if attempt == self.access.retries or not is_passing:
                    raise
            pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """Data of server-sent events as they come, up to ``[DONE]``; raises as `ask`.

        Lines are split at line feeds alone: JSON may hold other separators.
        """
        rest = b""
        async with self._opened(path, body) as reply:
            async for piece in reply.aiter_bytes():
                *lines, rest = (rest + piece).split(b"\n")
                self._check_length(max((rest, *lines), key=len), path)
                for line in lines:
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    if line.startswith(b"data:"):
                        yield data

    def parse(self, kind: type[Page], text: bytes, path: str) -> Page:
        """What came from a path as a record.

        Raises:
            SpeculatorError: it is not one.
        """
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            raise SpeculatorError(
                f"{self.access.url}{path}: not an answer of {self.access.expected}: "
                f"{first_fault(error)}. Check the URL and the server's version."
            ) from error

    def shown(self, text: str) -> str:
        """On one line, shortened, and without the key, which some servers repeat."""
        line = " ".join(text.split())
        if self.access.key:
            line = line.replace(self.access.key, "***")
        return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."

    @asynccontextmanager
    async def _opened(
        self, path: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[httpx.Response]:
        """An answer with status 200, of which nothing has been read."""
        method, where = "GET" if body is None else "POST", f"{self.access.url}{path}"
        with self._failures(where):
            async with self._client.stream(method, where, json=body) as reply:
                if reply.status_code != 200:
                    raise self._refusal(reply.status_code, await self._page(reply, path), where)
                yield reply

    async def _page(self, reply: httpx.Response, path: str) -> bytes:
        page = bytearray()
        async for piece in reply.aiter_bytes():
            page += piece
            self._check_length(page, path)
        return bytes(page)

    def _check_length(self, text: bytes | bytearray, path: str) -> None:
        if len(text) > MAX_PAGE_BYTES:
            raise SpeculatorError(
                f"{self.access.url}{path}: an answer of over {MAX_PAGE_BYTES} bytes, expected "
                f"one of {self.access.expected}. Check the URL."
            )

    def _refusal(self, status: int, page: bytes, where: str) -> Refused:
        hint = {
            401: f" Pass the server's key as {self.access.key_option}.",
            404: f" Expected {self.access.expected}, which has this.",
        }.get(status, "")
        shown = self.shown(page.decode("utf-8", "replace"))
        return Refused(f"{where}: HTTP {status}: {shown}{hint}", status)

    @contextmanager
    def _failures(self, where: str) -> Iterator[None]:
        """Turns what the network does wrong into one line."""
        access = self.access
        try:
            yield
        except httpx.TimeoutException as error:
            option = f" ({access.timeout_option})" if access.timeout_option else ""
            raise Unreachable(
                f"{where}: no answer in time ({type(error).__name__}); it has "
                f"{access.connect_within_s:g} s to accept a connection and {access.timeout_s:g} s"
                f"{option} to answer."
            ) from error
        except httpx.TransportError as error:
            raise Unreachable(
                f"{where}: {_reason(error)}. Expected {access.expected}; check that it runs and "
                "that the URL is right."
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SpeculatorError(
                f"{where}: {first_line(error)}. Expected {access.expected}; correct the URL."
            ) from error


class BlockingClient:
    """A `Client` for code without an event loop; many threads may ask at a time."""

    def __init__(self, access: Access) -> None:
        self._client = Client(access)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()

    def ask(self, kind: type[Page], path: str, body: Mapping[str, Any] | None = None) -> Page:
        """As `Client.ask`."""
        return self._wait_for(self._client.ask(kind, path, body))

    def close(self) -> None:
        self._wait_for(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait_for(self, task: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(task, self._loop).result()


def _reason(error: BaseException) -> str:
    """What the operating system said, where it is at the bottom of an error of httpx's."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.errno:
            return os.strerror(below.errno)
        first = below.exceptions[0] if isinstance(below, BaseExceptionGroup) else None
        below = first or below.__cause__ or below.__context__
    return first_line(error)
