"""Conversations, answered turn by turn by the verifier.

original    user  assistant  user  assistant(call)  tool  assistant
asked for         ^1               ^2                     ^3 if 2 calls what the tool answers
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from xxhash import xxh64_hexdigest, xxh64_intdigest

from speculators_core.data_generation.texts.messages import Message, Tool

KEPT = ("role", "content", "name", "tool_call_id")
"""Keys of a message that is not the assistant's."""
SEED_BITS = 31
"""All that some servers take."""
CALL_ID_LENGTH = 9
"""Characters; Mistral's templates take no other number."""


@dataclass(frozen=True)
class Call:
    """Of a tool."""

    name: str
    arguments: str
    """JSON, as the verifier wrote it."""
    id: str | None = None
    """The verifier's; None where it wrote none."""


@dataclass(frozen=True)
class Answer:
    """One turn of the verifier."""

    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    is_cut: bool = False
    """It reached `max_tokens` before its end."""
    num_tokens: int = 0

    def message(self, turn: str) -> Message:
        """As chat templates and servers take it; a call without an id gets one of the turn."""
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


@dataclass
class Tally:
    """Answers and tokens of many dialogues, counted as they come."""

    num_answers: int = 0
    num_tokens: int = 0
    num_under_way: int = 0
    """Tokens of answers that have not ended."""

    def add(self, answer: Answer) -> None:
        self.num_answers += 1
        self.num_tokens += answer.num_tokens


class Dialogue:
    """One conversation, answered turn after turn.

    The assistant's turns before the first question are left out, and consecutive ones are one. A
    conversation that ends with another's turn is answered there as well. It ends early after an
    answer that does not fit the next turns: tool calls other than those that have results.
    """

    def __init__(
        self,
        key: str,
        messages: Sequence[Message],
        tools: list[Tool] | None = None,
        seed: int = 0,
        keeps_cut: bool = False,
        tally: Tally | None = None,
    ) -> None:
        """``messages`` as `read_messages` gives them.

        ``keeps_cut``: an answer that was cut is the last; else the one before it is.
        """
        self.key = key
        self.tools = [
            tool if "function" in tool else {"type": "function", "function": tool}
            for tool in tools or ()
        ]
        self.messages: list[Message] = []
        """So far."""
        self.num_answers = 0
        self.num_tokens = 0
        """Of all answers."""
        self.fault: str | None = None
        """Why there is nothing to keep."""
        self.has_failed = False
        """It could not be answered."""
        self.tally = tally or Tally()
        self._seed = seed
        self._keeps_cut = keeps_cut
        self._rest = deque(messages)
        self._advance()
        if not self.is_open:
            self.fault = "nobody asks anything in it"

    @classmethod
    def malformed(cls, key: str, fault: str) -> "Dialogue":
        """One that cannot be read, and has ended."""
        dialogue = cls(key, [])
        dialogue.fault = fault
        return dialogue

    @property
    def is_open(self) -> bool:
        """Whether the verifier is to answer ``messages``."""
        return bool(self.messages) and self.messages[-1]["role"] != "assistant"

    @property
    def turn(self) -> str:
        """The name of the next answer."""
        return f"{self.key}/{self.num_answers}"

    @property
    def seed(self) -> int:
        """Of the next answer; the same in each run."""
        return xxh64_intdigest(self.turn.encode(), seed=self._seed) >> (64 - SEED_BITS)

    def take(self, answer: Answer) -> None:
        """Goes on to where the verifier is asked next."""
        self.tally.add(answer)
        self.num_tokens += answer.num_tokens
        if answer.is_cut and not self._keeps_cut:
            self._end("its first answer was cut at max_tokens")
            return
        given = answer.message(self.turn)
        self.messages.append(given)
        self.num_answers += 1
        if answer.is_cut or not self._lets_go_on(given.get("tool_calls", [])):
            self._rest.clear()
        self._advance()

    def fail(self, reason: str) -> None:
        """Ends it with nothing to keep."""
        self.messages, self.fault, self.has_failed = [], reason, True

    def _end(self, fault: str) -> None:
        while self.is_open:
            self.messages.pop()
        if not self.messages:
            self.fault = fault

    def _advance(self) -> None:
        """Takes over the turns of others, up to where the assistant speaks."""
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
        """Whether what comes next fits these calls; results then name the calls they answer."""
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
