"""A server that speaks OpenAI's protocol answers: /chat/completions, many at one time."""

import asyncio
import itertools
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from speculators_core.data_generation.answers.dialogues import Answer, Call, Dialogue
from speculators_core.data_generation.answers.settings import AnswersConfig, OfflineConfig
from speculators_core.errors import SpeculatorError, first_fault, first_line

Page = TypeVar("Page", bound=BaseModel)
AHEAD = 4
"""Conversations that are taken for each one that is answered: a long one holds few others up."""
CONNECT_WITHIN_S = 10.0
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
MAX_PAGE_BYTES = 2**24
SHOWN_CHARACTERS = 200
REFUSED = (400, 413, 422)
"""The conversation is at fault."""
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
"""Asked again."""
DRAWN_IDS = ("chatcmpl-tool-", "call_")
"""How ids begin that a server drew for tool calls: others in each run, and not the verifier's."""


class _Function(BaseModel):
    name: str
    arguments: str = "{}"


class _Call(BaseModel):
    function: _Function
    id: str | None = None


class _Message(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[_Call, ...] | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int = 0


class _Completion(BaseModel):
    choices: tuple[_Choice, ...] = Field(min_length=1)
    usage: _Usage | None = None


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: tuple[_Model, ...] = Field(min_length=1)


class _Refused(Exception):
    """The conversation is at fault, or the server breaks on it."""


class OpenAIEndpoint:
    """Answers each conversation by requests one after another, and many conversations at a time."""

    def __init__(self, config: AnswersConfig) -> None:
        """Raises:
        SpeculatorError: the server is not there, or has several models and none is named; or there
            are options that are the server's.
        """
        import httpx

        url = config.endpoint.base_url
        if url is None:
            raise SpeculatorError("engine openai needs --base-url, http://host:port/v1.")
        for name, default in OfflineConfig():
            if getattr(config.offline, name) != default:
                raise SpeculatorError(f"{name}: the server at {url} decides it itself.")
        self._url = url.rstrip("/") + ("" if urlsplit(url).path.strip("/") else "/v1")
        self._endpoint, self._sampling = config.endpoint, config.sampling
        self._key = (config.endpoint.api_key or os.environ.get("OPENAI_API_KEY", "")).strip()
        self._going: deque[asyncio.Task[Dialogue]] = deque()
        self._runner = asyncio.Runner()
        with self._failures():
            self._client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
                timeout=httpx.Timeout(config.endpoint.timeout_s, connect=CONNECT_WITHIN_S),
                limits=httpx.Limits(max_connections=None),  # conversations are counted, below
            )
        try:
            self._model = config.endpoint.model or config.verifier or self._only_model()
        except BaseException:
            self.close()
            raise

    def answer(self, dialogues: Iterator[Dialogue]) -> Iterator[Dialogue]:
        """Raises:
        SpeculatorError: the server is gone, or does not answer as one that speaks the protocol.
        """
        loop = self._runner.get_loop()
        room = asyncio.Semaphore(self._endpoint.concurrency)
        ahead = AHEAD * self._endpoint.concurrency
        while True:
            for dialogue in itertools.islice(dialogues, ahead - len(self._going)):
                self._going.append(loop.create_task(self._converse(dialogue, room)))
            if not self._going:
                return
            yield self._runner.run(_result(self._going[0]))
            self._going.popleft()

    def close(self) -> None:
        """Ends what still goes on."""
        for task in self._going:
            task.cancel()
        self._runner.run(_settled(self._going))
        self._runner.run(self._client.aclose())
        self._runner.close()

    def _only_model(self) -> str:
        names = [model.id for model in self._runner.run(self._ask(_Models, "GET", "/models")).data]
        if len(names) > 1:
            raise SpeculatorError(f"{self._url} has {', '.join(names)}; name one with --model.")
        return names[0]

    async def _converse(self, dialogue: Dialogue, room: asyncio.Semaphore) -> Dialogue:
        async with room:
            while dialogue.is_open:
                try:
                    body = self._body(dialogue)
                    page = await self._ask(_Completion, "POST", "/chat/completions", body)
                    dialogue.take(_read(page))
                except _Refused as refused:
                    dialogue.fail(str(refused))
        return dialogue

    def _body(self, dialogue: Dialogue) -> dict[str, Any]:
        """What not every server knows is left out where nobody asked for it."""
        sampling = self._sampling
        stated = {
            "model": self._model,
            "messages": dialogue.messages,
            "tools": dialogue.tools or None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_tokens,
            "seed": dialogue.seed if sampling.temperature > 0 else None,
            "chat_template_kwargs": sampling.template_options or None,
        }
        return {name: value for name, value in stated.items() if value is not None}

    async def _ask(self, kind: type[Page], method: str, path: str, body: Any = None) -> Page:
        """The page, asked for again while the server is busy, broken or silent."""
        where = f"{self._url}{path}"
        for attempt in itertools.count():
            is_last = attempt == self._endpoint.retries
            with self._failures(passes=not is_last):
                status, page = await self._fetch(method, where, body)
                if status == 200:
                    return self._parse(kind, page, where)
                told = f"{where}: HTTP {status}: {self._shown(page)}"
                if status in REFUSED or (status == 500 and is_last):
                    raise _Refused(told)
                if status not in BUSY or is_last:
                    hint = " Pass the server's key with --api-key." if status == 401 else ""
                    raise SpeculatorError(f"{told}{hint}")
            pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    async def _fetch(self, method: str, where: str, body: Any) -> tuple[int, bytes]:
        page = bytearray()
        async with self._client.stream(method, where, json=body) as reply:
            async for piece in reply.aiter_bytes():
                page += piece
                if len(page) > MAX_PAGE_BYTES:
                    raise SpeculatorError(f"{where}: an answer of over {MAX_PAGE_BYTES} bytes.")
        return reply.status_code, bytes(page)

    def _parse(self, kind: type[Page], page: bytes, where: str) -> Page:
        try:
            return kind.model_validate_json(page)
        except ValidationError as error:
            raise SpeculatorError(
                f"{where}: no answer of OpenAI's protocol: {first_fault(error)}"
            ) from error

    def _shown(self, page: bytes) -> str:
        """On one line, not all of a long one, and without our key, which some servers repeat."""
        line = " ".join(page.decode("utf-8", "replace").split())
        if self._key:
            line = line.replace(self._key, "***")
        return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."

    @contextmanager
    def _failures(self, passes: bool = False) -> Iterator[None]:
        """What the network does wrong becomes one line, or with ``passes`` nothing."""
        import httpx

        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if passes and isinstance(error, httpx.TransportError):
                return
            if isinstance(error, httpx.TimeoutException):
                raise SpeculatorError(
                    f"{self._url} gave no answer in time ({type(error).__name__}); --timeout-s "
                    "says how long it has."
                ) from error
            raise SpeculatorError(f"{self._url}: {first_line(error)}.") from error


async def _result(task: asyncio.Task[Dialogue]) -> Dialogue:
    return await task


async def _settled(tasks: Iterable[asyncio.Task[Dialogue]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def _read(page: _Completion) -> Answer:
    choice = page.choices[0]
    if choice.finish_reason not in ("stop", "length", "tool_calls", None):
        raise _Refused(f"the server ended an answer: {choice.finish_reason}")
    said = choice.message
    calls = [
        Call(
            call.function.name,
            call.function.arguments,
            None if not call.id or call.id.startswith(DRAWN_IDS) else call.id,
        )
        for call in said.tool_calls or ()
    ]
    return Answer(
        content=said.content or "",
        reasoning=said.reasoning_content or said.reasoning or "",
        calls=tuple(calls),
        is_cut=choice.finish_reason == "length",
        num_tokens=page.usage.completion_tokens if page.usage else 0,
    )
