"""HTTP as a measurement needs it: streamed events, and failures in one line that says where."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.settings import Settings

Answer = TypeVar("Answer", bound=BaseModel)
CONNECT_WITHIN_S = 10.0
SHOWN_CHARACTERS = 200
"""Of what a server says about a failure."""


class ServerConfig(Settings):
    """Which servers are asked."""

    base_url: str | None = None
    """A running vLLM server with a speculator, http://host:port; it decides draft, K and dtype."""
    baseline_url: str | None = None
    """The same server without speculation: what speed and outputs are compared with."""
    api_key: str | None = Field(None, exclude=True, repr=False)
    """Of the servers; OPENAI_API_KEY where none is given."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest silence of a server before a request counts as failed."""


@asynccontextmanager
async def session(settings: ServerConfig, connections: int = 1) -> AsyncIterator[Any]:
    """An aiohttp client with the servers' key and so many connections."""
    try:
        import aiohttp
    except ImportError as error:
        raise SpeculatorError(
            "--base-url needs aiohttp, which vLLM brings: pip install aiohttp."
        ) from error
    key = (settings.api_key or os.environ.get("OPENAI_API_KEY", "")).strip()
    async with aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {key}"} if key else None,
        timeout=aiohttp.ClientTimeout(
            total=None,
            sock_connect=min(CONNECT_WITHIN_S, settings.timeout_s),
            sock_read=settings.timeout_s,
        ),
        connector=aiohttp.TCPConnector(limit=connections),
    ) as client:
        yield client


@contextmanager
def failures(where: str) -> Iterator[None]:
    """What the network does wrong becomes one line that says where."""
    import aiohttp

    try:
        yield
    except TimeoutError as error:
        raise SpeculatorError(
            f"{where}: no word for too long; --timeout-s says how long that is."
        ) from error
    except aiohttp.ClientError as error:
        raise SpeculatorError(f"{where}: {first_line(error)}") from error


async def get(client: Any, url: str, path: str) -> str:
    """The page, which is answered with 200 and nothing else."""
    with failures(f"{url}{path}"):
        async with client.get(f"{url}{path}", allow_redirects=False) as reply:
            if reply.status != 200:
                raise SpeculatorError(f"{url}{path}: {await describe(reply)}")
            return (await reply.read()).decode("utf-8", "replace")


async def describe(reply: Any) -> str:
    """What a server answers that does not do what it was asked."""
    hint = {
        401: " Pass the server's key with --api-key.",
        404: " Expected a vLLM server, which has this.",
    }.get(reply.status, "")
    text = (await reply.read()).decode("utf-8", "replace")
    return f"HTTP {reply.status}: {shown(text)}{hint}"


def shown(text: str) -> str:
    """On one line, and not all of a long one."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."


def read(kind: type[Answer], text: str | bytes, where: str) -> Answer:
    """The answer as a record; raises SpeculatorError where it is none."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise SpeculatorError(f"{where}: no answer of vLLM's: {first_fault(error)}") from error


async def events(content: Any) -> AsyncIterator[bytes]:
    """Server-sent events up to ``[DONE]``; a line may be longer than any buffer of aiohttp's."""
    rest = b""
    async for piece in content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            event = line.removeprefix(b"data:").strip()
            if event == b"[DONE]":
                return
            if line.startswith(b"data:"):
                yield event
