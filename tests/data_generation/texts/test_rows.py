"""Rows that are not what their columns promise."""

import pytest

from speculators_core.data_generation.settings import ColumnMapping
from speculators_core.data_generation.texts.rows import RowReader, choose_parts
from speculators_core.data_generation.texts.spans import RowSkipped, SkipReason
from tests.data_generation.texts.families import make_chat

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "world"}
IMAGE = {"role": "user", "content": [{"type": "image", "url": "a"}]}


def said_by(**assistant) -> dict:
    return {"messages": [USER, {"role": "assistant", **assistant}]}


def nested(depth):
    found = []
    for _ in range(depth):  # deeper than any library lets Python recurse
        found = [found]
    return found


@pytest.mark.parametrize(
    "row, detail",
    [
        ({"input_ids": []}, "token ids, found \\[]"),
        ({"input_ids": 40}, "token ids, found 40"),
        ({"input_ids": ["a"]}, "found \\['a']"),
        ({"input_ids": [40.0]}, "found \\[40.0]"),
        ({"input_ids": [40, 10_000]}, "token ids in 0..*, found 40..10000"),
        ({"input_ids": [-1, 40]}, "token ids in 0..*, found -1..40"),
        ({"input_ids": [40, 41], "loss_mask": [1]}, "mask of 2 tokens, found 1"),
        ({"input_ids": [40, 41], "loss_mask": [0.5, 1.0]}, "mask of 0 and 1"),
        ({"input_ids": [40, 41], "loss_mask": 1}, "mask of 0 and 1"),
        ({"messages": None}, "list of messages, found None"),
        ({"messages": []}, "list of messages, found \\[]"),
        ({"messages": "hello"}, "list of messages, found 'hello'"),
        ({"messages": "[" * 9_999}, "too deeply"),
        ({"messages": [USER | {"tag": nested(20_000)}, ANSWER]}, "too deeply"),
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "list of messages, found"),
        ({"messages": ["hello"]}, "a message, found 'hello'"),
        ({"messages": [{"content": "hello"}]}, "a message with a role, found"),
        ({"messages": [USER | {"role": 5}]}, "a message with a role, found"),
        ({"messages": [IMAGE, ANSWER]}, "that is text, found .*image"),
        (said_by(content=5), "that is text, found 5"),
        (said_by(tool_calls=[{"id": "1"}]), "expected a tool call"),
        (said_by(tool_calls=["weather"]), "expected a tool call"),
        (said_by(tool_calls=5), "list of tool calls"),
        (
            {"messages": [USER, {"from": "function_call", "value": "weather()"}]},
            "expected a tool call",
        ),
        ({"messages": [USER, ANSWER], "tools": "a hammer"}, "list of tools"),
        ({"messages": [USER, ANSWER], "tools": ["a hammer"]}, "list of tools"),
        ({"prompt": "", "completion": "a"}, "text in 'prompt', found ''"),
        ({"prompt": "a", "completion": 5}, "text in 'completion', found 5"),
        ({"prompt": [USER], "completion": "a"}, "list of messages"),
        ({"text": None}, "text in 'text'"),
        ({"text": ""}, "text in 'text'"),
    ],
)
def test_a_malformed_row_is_skipped_and_shown(row, detail):
    parts = choose_parts(list(row), ColumnMapping(), "here", is_open=False)
    chat = make_chat("llama3")
    with pytest.raises(RowSkipped, match=detail) as skipped:
        RowReader(chat.tokenizer, chat).read(row, parts)
    assert skipped.value.reason is SkipReason.MALFORMED


def test_what_is_shown_of_a_row_is_short():
    parts = choose_parts(["messages"], ColumnMapping(), "here", is_open=False)
    with pytest.raises(RowSkipped) as skipped:
        RowReader(make_chat("llama3").tokenizer, None).read({"messages": "a" * 10_000}, parts)
    assert len(str(skipped.value)) < 200


def test_thoughts_have_every_name_that_templates_read_them_by():
    parts = choose_parts(["messages"], ColumnMapping(), "here", is_open=False)
    for family, shown in (("qwen3", "<think>\nA greeting.\n</think>"), ("gpt_oss", "A greeting.")):
        chat = make_chat(family)
        for name in ("reasoning", "reasoning_content", "thinking"):
            row = said_by(content="world", **{name: "A greeting."})
            (sequence,) = RowReader(chat.tokenizer, chat).read(row, parts)
            assert shown in chat.tokenizer.decode(sequence.input_ids)


def test_empty_thoughts_and_calls_are_as_if_they_were_not_there():
    parts = choose_parts(["messages"], ColumnMapping(), "here", is_open=False)
    chat = make_chat("gpt_oss")
    for nothing in ({}, {"thinking": "", "tool_calls": []}, {"thinking": None, "tool_calls": None}):
        (sequence,) = RowReader(chat.tokenizer, chat).read(said_by(content="a", **nothing), parts)
        text = chat.tokenizer.decode(sequence.input_ids)
        assert text.endswith("hello<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>")
