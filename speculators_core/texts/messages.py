"""Messages and tools of rows, normalised for chat templates."""

import json
from typing import Any

Message = dict[str, Any]
"""`role`, `content`, and other keys that chat templates read: `tool_calls`, `reasoning_content`."""

Tool = Message
"""A tool or a tool call, as chat templates expect it."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""Role names of ShareGPT and similar formats."""
UNTRAINED = {"weight": 0, "train": False}
"""Keys of a message, and the value of each that leaves it out of training."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys that templates use for the assistant's reasoning."""


class MalformedRow(ValueError):
    """A row holds something else than its columns promise."""


def read_messages(value: object) -> list[Message]:
    """Messages as chat templates expect them, also from ShareGPT's `from` and `value`.

    Null keys, and empty tool calls or reasoning, are removed: a table has every key in every row,
    and some templates test whether a key is present. Arguments of tool calls that are JSON in a
    string, as servers return them, are parsed.

    A message with a ``weight`` of 0, or with ``train`` false, gets ``train`` false: it is not
    learned.

    Raises:
        MalformedRow: the value is not a list of messages, or their content is not only text.
    """
    value = _parsed(value)
    if not isinstance(value, list | tuple) or not value:
        raise MalformedRow(f"expected a list of messages, found {shown(value)}")
    return [_read_message(raw) for raw in value]


def read_template_options(value: object) -> dict[str, Any]:
    """Variables of the chat template for one row, from an object or its JSON.

    Raises:
        MalformedRow: the value is not an object.
    """
    value = _parsed(value)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MalformedRow(f"expected an object of template options, found {shown(value)}")
    return _without_nulls(value)


def read_tools(value: object) -> list[Tool] | None:
    """Tools as chat templates expect them, from a list or its JSON; None where there are none.

    Raises:
        MalformedRow: the value is not a list of tools.
    """
    if isinstance(value, list | tuple):
        value = [_parsed(tool) for tool in value]
    else:
        value = _parsed(value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise MalformedRow(f"expected a list of tools, found {shown(value)}")
    return _without_nulls(value)


def _read_message(raw: object) -> Message:
    if not isinstance(raw, dict):
        raise MalformedRow(f"expected a message, found {shown(raw)}")
    message = _without_nulls(raw)
    kind = message.pop("from", None)
    role = message.setdefault("role", kind)
    if not isinstance(role, str):
        raise MalformedRow(f"expected a message with a role, found {shown(raw)}")
    message["role"] = ROLES.get(role, role)
    stated = {name: message.pop(name) for name in UNTRAINED if name in message}
    if any(stated[name] == UNTRAINED[name] for name in stated):
        message["train"] = False
    content = _read_content(message.pop("content", message.pop("value", "")))
    calls = message.pop("tool_calls", None)
    if role == "function_call":
        content, calls = "", [{"type": "function", "function": _parsed(content)}]
    if calls:
        if not isinstance(calls, list):
            raise MalformedRow(f"expected a list of tool calls, found {shown(calls)}")
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
        raise MalformedRow(f"expected content that is text, found {shown(content)}")
    return "\n".join(texts)


def _read_call(call: object) -> Tool:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise MalformedRow(f"expected a tool call, found {shown(call)}")
    assert isinstance(call, dict)
    function = {**function, "arguments": _parsed(function.get("arguments", {}))}
    return {**call, "function": function} if "function" in call else function


def _parsed(value: object) -> Any:
    """A string parsed as JSON; unchanged if it is not valid JSON or has a lone surrogate."""
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


def shown(value: object) -> str:
    """A value's repr for error messages, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
