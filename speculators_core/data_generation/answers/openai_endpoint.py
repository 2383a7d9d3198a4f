"""Answers from an OpenAI-compatible server, requested concurrently."""

import asyncio
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from speculators_core.data_generation.answers.dialogues import Answer, Call, Dialogue
from speculators_core.data_generation.answers.settings import AnswersConfig, OfflineConfig
from speculators_core.errors import SpeculatorError
from speculators_core.http import Access, Client, Models, Refused

AHEAD = 4
"""Conversations read for each concurrent request, so that a long one delays few others."""
BROKEN = 500
"""Status that remains after all retries when a conversation crashes the server's handler."""
DRAWN_IDS = ("chatcmpl-tool-", "call_")
"""Prefixes of tool call ids that the server draws at random, which the verifier did not write."""


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
    token_ids: tuple[int, ...] | None = None


class _Usage(BaseModel):
    completion_tokens: int = 0


class _Completion(BaseModel):
    choices: tuple[_Choice, ...] = Field(min_length=1)
    usage: _Usage | None = None
    prompt_token_ids: tuple[int, ...] | None = None


class OpenAIEndpoint:
    """Answers many conversations at a time, each by one request per turn."""

    def __init__(self, config: AnswersConfig) -> None:
        """Raises:
        SpeculatorError: the server cannot be reached, it has several models and none is named, or
            an option is set that only applies to the offline engine.
        """
        url = config.endpoint.base_url
        if url is None:
            raise SpeculatorError(
                "endpoint.base_url is missing, which engine openai requires. Pass the server's "
                "address: --base-url http://host:port/v1."
            )
        for name, default in OfflineConfig():
            if getattr(config.offline, name) != default:
                raise SpeculatorError(
                    f"{name} is {getattr(config.offline, name)!r}, but the server at {url} "
                    "decides it; expected the default with engine openai. Leave the option out, "
                    "and set it where the server is started."
                )
        self._endpoint, self._sampling = config.endpoint, config.sampling
        self._wants_ids = config.token_ids
        self._going: deque[asyncio.Task[Dialogue]] = deque()
        self._client = Client(
            Access(
                url=url.rstrip("/") + ("" if urlsplit(url).path.strip("/") else "/v1"),
                api_key=config.endpoint.api_key,
                timeout_s=config.endpoint.timeout_s,
                connections=None,  # conversations are counted, below
                retries=config.endpoint.retries,
                uses_proxy=True,
                expected="a server that speaks OpenAI's protocol",
            )
        )
        self._runner = asyncio.Runner()
        try:
            self._model = config.endpoint.model or config.verifier or self._only_model()
        except BaseException:
            self.close()
            raise

    def answer(self, dialogues: Iterator[Dialogue]) -> Iterator[Dialogue]:
        """Raises:
        SpeculatorError: the server cannot be reached, or its response is not of the protocol.
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
        """Cancels pending requests."""
        for task in self._going:
            task.cancel()
        self._runner.run(_settled(self._going))
        self._runner.run(self._client.close())
        self._runner.close()

    def _only_model(self) -> str:
        found = self._runner.run(self._client.ask(Models, "/models"))
        names = [model.id for model in found.data]
        if len(names) > 1:
            url = self._client.access.url
            raise SpeculatorError(
                f"{url} serves {len(names)} models ({', '.join(names)}), expected one. "
                "Choose one with --model."
            )
        return names[0]

    async def _converse(self, dialogue: Dialogue, room: asyncio.Semaphore) -> Dialogue:
        async with room:
            while dialogue.is_open:
                body = self._body(dialogue)
                try:
                    page = await self._client.ask(_Completion, "/chat/completions", body)
                except Refused as error:
                    if not error.is_request_at_fault and error.status != BROKEN:
                        raise
                    dialogue.fail(str(error))
                else:
                    _take(dialogue, page)
        return dialogue

    def _body(self, dialogue: Dialogue) -> dict[str, Any]:
        """The request; options that not every server supports are omitted unless set."""
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
            "chat_template_kwargs": dialogue.options_of_template(sampling.template_options),
            "return_token_ids": self._wants_ids or None,
        }
        return {name: value for name, value in stated.items() if value is not None}


async def _result(task: asyncio.Task[Dialogue]) -> Dialogue:
    return await task


async def _settled(tasks: Iterable[asyncio.Task[Dialogue]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def _take(dialogue: Dialogue, page: _Completion) -> None:
    choice = page.choices[0]
    if choice.finish_reason not in ("stop", "length", "tool_calls", None):
        dialogue.fail(f"the server ended an answer: {choice.finish_reason}")
        return
    said = choice.message
    calls = [
        Call(
            call.function.name,
            call.function.arguments,
            None if not call.id or call.id.startswith(DRAWN_IDS) else call.id,
        )
        for call in said.tool_calls or ()
    ]
    dialogue.take(
        Answer(
            content=said.content or "",
            reasoning=said.reasoning_content or said.reasoning or "",
            calls=tuple(calls),
            is_cut=choice.finish_reason == "length",
            num_tokens=page.usage.completion_tokens if page.usage else 0,
            prompt_ids=page.prompt_token_ids or (),
            token_ids=choice.token_ids or (),
        )
    )
