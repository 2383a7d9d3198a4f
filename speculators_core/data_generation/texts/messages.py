"""Messages and tools of conversations: what data sets hold, as chat templates take it."""

import json
from typing import Any

from speculators_core.data_generation.texts.spans import RowSkipped, SkipReason

Message = dict[str, Any]
"""`role`, `content`, and what else a chat template reads: `tool_calls`, `reasoning_content`."""

Tool = Message
"""A tool or a call of one, as a chat template takes it."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""Other names for roles, as ShareGPT and its kin have them."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names that templates have for what an assistant thinks."""


def read_messages(value: object) -> list[Message]:
    """Messages as chat templates take them, of those or of ShareGPT's `from` and `value`.

    A key that is null, and tool calls or thoughts that are empty, are left out: a table has every
    key in every row, and some templates ask whether one is there. Arguments of tool calls
    that are JSON in a string, as servers give them, become what they say.

    Raises:
        RowSkipped: it is no list of messages, or there is more in them than text.
    """
    value = _parsed(value)
    if not isinstance(value, list) or not value:
        raise malformed(f"expected a list of messages, found {shown(value)}")
    return [_read_message(raw) for raw in value]


def read_tools(value: object) -> list[Tool] | None:
    """Tools as chat templates take them, of a list or its JSON; None where there are none.

    Raises:
        RowSkipped: it is no list of tools.
    """
    value = [_parsed(tool) for tool in value] if isinstance(value, list) else _parsed(value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise malformed(f"expected a list of tools, found {shown(value)}")
    return _without_nulls(value)


def _read_message(raw: object) -> Message:
    if not isinstance(raw, dict):
        raise malformed(f"expected a message, found {shown(raw)}")
    message = _without_nulls(raw)
    kind = message.pop("from", None)
    role = message.setdefault("role", kind)
    if not isinstance(role, str):
        raise malformed(f"a message without role: {shown(raw)}")
    message["role"] = ROLES.get(role, role)
    content = _read_content(message.pop("content", message.pop("value", "")))
    calls = message.pop("tool_calls", None)
    if role == "function_call":
        content, calls = "", [{"type": "function", "function": _parsed(content)}]
    if calls:
        if not isinstance(calls, list):
            raise malformed(f"expected a list of tool calls, found {shown(calls)}")
        message["tool_calls"] = [_read_call(call) for call in calls]
    thoughts = [text for name in THOUGHTS if (text := message.pop(name, None))]
    if thoughts:
        message |= dict.fromkeys(THOUGHTS, thoughts[0])
    return message | {"content": content}


def _read_content(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    found = [part.get("text") for part in parts if isinstance(part, dict)]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(parts):
        raise malformed(f"content that is no text: {shown(content)}")
    return "\n".join(texts)


def _read_call(call: object) -> Tool:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise malformed(f"expected a tool call, found {shown(call)}")
    assert isinstance(call, dict)
    function = {**function, "arguments": _parsed(function.get("arguments", {}))}
    return {**call, "function": function} if "function" in call else function


def _parsed(value: object) -> Any:
    """What a string says as JSON; itself where it says nothing, or half a surrogate pair."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
        json.dumps(parsed, ensure_ascii=False).encode()
    except ValueError:
        return value
    return parsed


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    if isinstance(value, list):
        return [_without_nulls(held) for held in value]
    return value


def malformed(detail: str) -> RowSkipped:
    return RowSkipped(SkipReason.MALFORMED, detail)


def shown(value: object) -> str:
    """As a message shows it, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
