"""Conversations, answered turn by turn by the verifier.

original    user  assistant  user  assistant(call)  tool  assistant
asked for         ^1               ^2                     ^3 if 2 calls what the tool answers
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from pydantic import JsonValue
from xxhash import xxh64_hexdigest, xxh64_intdigest

from speculators_core.texts.messages import Message, Tool

KEPT = ("role", "content", "name", "tool_call_id")
"""Keys of a message that is not the assistant's."""
SEED_BITS = 31
"""Bits of a seed that every server accepts."""
CALL_ID_LENGTH = 9
"""Characters of a tool call's id; Mistral's templates accept no other number."""


@dataclass(frozen=True)
class Call:
    """A tool call."""

    name: str
    arguments: str
    """JSON as the verifier wrote it."""
    id: str | None = None
    """Id that the verifier wrote, if any."""


@dataclass(frozen=True)
class Answer:
    """One turn of the verifier."""

    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    is_cut: bool = False
    """Whether it reached `max_tokens` before its end."""
    num_tokens: int = 0
    prompt_ids: tuple[int, ...] = ()
    """Token ids that the verifier read; empty where the engine does not report them."""
    token_ids: tuple[int, ...] = ()
    """Token ids that the verifier wrote, the one that ends the answer included."""

    def message(self, turn: str) -> Message:
        """The answer as a message; a tool call without an id gets one derived from the turn."""
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": call.id or xxh64_hexdigest(f"{turn}/{number}".encode())[:CALL_ID_LENGTH],
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(self.calls)
            ]
        return message


@dataclass(frozen=True)
class TokenRow:
    """What the verifier read and wrote, as token ids."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    """1 for each token that the verifier wrote."""

    def extended(self, answer: Answer) -> "TokenRow | None":
        """The row up to the end of a later answer; None where that was given another history."""
        if answer.prompt_ids[: len(self.input_ids)] != self.input_ids:
            return None
        num_read = len(answer.prompt_ids) - len(self.input_ids)
        return TokenRow(
            answer.prompt_ids + answer.token_ids,
            self.loss_mask + (0,) * num_read + (1,) * len(answer.token_ids),
        )


@dataclass
class Tally:
    """Answers and tokens of many dialogues, counted as they come."""

    num_answers: int = 0
    num_tokens: int = 0
    num_under_way: int = 0
    """Tokens of unfinished answers."""

    def add(self, answer: Answer) -> None:
        self.num_answers += 1
        self.num_tokens += answer.num_tokens


class Dialogue:
    """One conversation, answered turn by turn.

    Assistant turns before the first question are dropped, and consecutive ones count as one. A
    conversation that ends with another role's turn is answered there as well. It ends early after
    an answer that does not fit the next turns: tool calls other than those that have results.
    """

    def __init__(
        self,
        key: str,
        messages: Sequence[Message],
        tools: list[Tool] | None = None,
        seed: int = 0,
        keeps_cut: bool = False,
        tally: Tally | None = None,
        template_options: Mapping[str, JsonValue] | None = None,
    ) -> None:
        """``messages``: the result of `read_messages`.

        ``keeps_cut``: the conversation ends after an answer that was cut; otherwise before it.
        ``template_options``: variables of the chat template for this conversation alone.
        """
        self.key = key
        self.tools = [
            tool if "function" in tool else {"type": "function", "function": tool}
            for tool in tools or ()
        ]
        self.template_options = dict(template_options or {})
        self.messages: list[Message] = []
        """Messages up to the next answer."""
        self.token_rows: list[TokenRow] = []
        """All kept answers as token ids. An answer whose history a template has rewritten begins
        another row."""
        self.num_answers = 0
        self.num_tokens = 0
        """Tokens of all answers."""
        self.fault: str | None = None
        """Why the conversation is not kept."""
        self.has_failed = False
        """Whether it could not be answered."""
        self.tally = tally or Tally()
        self._seed = seed
        self._keeps_cut = keeps_cut
        self._rest = deque(messages)
        self._advance()
        if not self.is_open:
            self.fault = "nobody asks anything in it"

    @classmethod
    def malformed(cls, key: str, fault: str) -> "Dialogue":
        """An ended dialogue for a row that cannot be read."""
        dialogue = cls(key, [])
        dialogue.fault = fault
        return dialogue

    @property
    def is_open(self) -> bool:
        """Whether the verifier is to answer ``messages``."""
        return bool(self.messages) and self.messages[-1]["role"] != "assistant"

    def options_of_template(self, for_all: Mapping[str, JsonValue]) -> dict[str, JsonValue] | None:
        """Variables of the chat template; those of the conversation win. None without any."""
        return {**for_all, **self.template_options} or None

    @property
    def turn(self) -> str:
        """Name of the next answer."""
        return f"{self.key}/{self.num_answers}"

    @property
    def seed(self) -> int:
        """Seed of the next answer, identical in every run."""
        return xxh64_intdigest(self.turn.encode(), seed=self._seed) >> (64 - SEED_BITS)

    def take(self, answer: Answer) -> None:
        """Adds an answer, and continues to the next question."""
        self.tally.add(answer)
        self.num_tokens += answer.num_tokens
        if answer.is_cut and not self._keeps_cut:
            self._end("its first answer was cut at max_tokens")
            return
        given = answer.message(self.turn)
        self.messages.append(given)
        self.num_answers += 1
        if answer.token_ids:
            self._keep_tokens(answer)
        if answer.is_cut or not self._lets_go_on(given.get("tool_calls", [])):
            self._rest.clear()
        self._advance()

    def _keep_tokens(self, answer: Answer) -> None:
        row = TokenRow((), ()).extended(answer)
        longer = self.token_rows[-1].extended(answer) if self.token_rows else None
        if longer is not None:
            row, self.token_rows = longer, self.token_rows[:-1]
        assert row is not None  # every prompt begins with nothing
        self.token_rows = [*self.token_rows, row]

    def fail(self, reason: str) -> None:
        """Ends the dialogue, which is not kept."""
        self.messages, self.fault, self.has_failed = [], reason, True

    def _end(self, fault: str) -> None:
        while self.is_open:
            self.messages.pop()
        if not self.messages:
            self.fault = fault

    def _advance(self) -> None:
        """Copies the turns of other roles, up to the assistant's next turn."""
        while self._rest:
            if self._rest[0]["role"] != "assistant":
                message = self._rest.popleft()
                self.messages.append({key: message[key] for key in KEPT if key in message})
            elif _asks(self.messages):
                return
            else:
                self._rest.popleft()
        if not _asks(self.messages):
            self.messages = []

    def _lets_go_on(self, calls: list[Tool]) -> bool:
        """Whether the next messages are results of these calls, which are then given their ids."""
        called: list[str] = []
        while self._rest and self._rest[0]["role"] == "assistant":
            replaced = self._rest.popleft().get("tool_calls", [])
            called += [call.get("function", call)["name"] for call in replaced]
        results = list(takewhile(lambda message: message["role"] == "tool", self._rest))
        names = [call["function"]["name"] for call in calls]
        if len(results) != len(calls) or (called and calls and called != names):
            return False
        for result, call in zip(results, calls, strict=True):
            self._rest.popleft()
            answers = {"tool_call_id": call["id"]}
            if "name" in result:
                answers["name"] = call["function"]["name"]
            self.messages.append({key: result[key] for key in KEPT if key in result} | answers)
        return True


def _asks(messages: Sequence[Message]) -> bool:
    return any(message["role"] not in ("system", "developer") for message in messages)
