"""Prompts of files as token ids: what a row may hold, and what is said of one that it may not."""

import json

import pytest

from speculators_core.decoding.default_prompts import default_prompts
from speculators_core.decoding.prompts import Prompt, read_prompts, tokenize
from speculators_core.errors import SpeculatorError
from speculators_core.verifier.reading import read_tokenizer
from tests.conftest import VOCAB_SIZE
from tests.vllm.serving import write_tokenizer

TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if tools %} tools{{ tools | length }}{% endif %}"
    "{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% if not thinks | default(true) %} quick{% endif %}"
    "{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path, VOCAB_SIZE)
    tokenizer = read_tokenizer(tmp_path)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts(tokenizer, tmp_path, *rows, **options):
    """The text of each row, as the chat template renders it."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def encode(text, **_):
        seen.append(text.strip())
        return {"input_ids": [5]}

    encode.chat_template = tokenizer.chat_template
    encode.apply_chat_template = tokenizer.apply_chat_template
    tokenize(read_prompts(path), encode, 100, **options)
    return seen


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (user("hi"), "user hi assistant"),
        (user([{"type": "text", "text": "hi"}]), "user hi assistant"),
        (user(None), "user  assistant"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "user hi assistant"),
        ({**user("hi"), "tools": [TOOL]}, "tools1 user hi assistant"),
        ({**user("hi"), "tools": json.dumps([TOOL])}, "tools1 user hi assistant"),
        ({**user("hi"), "tools": None}, "user hi assistant"),
        ({**user("hi"), "chat_template_kwargs": {"thinks": False}}, "user hi assistant quick"),
    ],
)
def test_a_conversation_is_read_as_servers_read_it(tokenizer, tmp_path, row, text):
    assert texts(tokenizer, tmp_path, row) == [text]


def test_options_hold_for_all_prompts_but_those_with_their_own(tokenizer, tmp_path):
    own = {**user("b"), "chat_template_kwargs": {"thinks": True}}
    found = texts(tokenizer, tmp_path, user("a"), own, template_options={"thinks": False})
    assert found == ["user a assistant quick", "user b assistant"]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [{"role": "system", "content": "be brief"}]}, "no system role"),
        ({**user("hi"), "chat_template_kwargs": {"tokenize": True}}, "'tokenize' is a parameter"),
        ({**user("hi"), "chat_template_kwargs": [1]}, "expected an object of template options"),
        (user([{"type": "image_url", "image_url": {}}]), "expected content that is text"),
        ({"messages": [{"content": "hi"}]}, "expected a message with a role"),
        ({"messages": []}, "expected either"),
        ({"prompt": "a", **user("hi")}, "expected either"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_its_reason(tokenizer, tmp_path, row, named):
    with pytest.raises(SpeculatorError) as error:
        texts(tokenizer, tmp_path, {"prompt": "fine"}, row)
    assert "prompts.jsonl, line 2" in str(error.value) and named in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_in_code_are_those_of_rows(tokenizer):
    chats = [prompt for prompt in default_prompts(tokenizer) if prompt.messages]
    assert len(chats) == 3
    assert Prompt(**user("hi")) == Prompt(messages=({"role": "user", "content": "hi"},))


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(SpeculatorError, match="no tokenizer"):
        read_tokenizer(tmp_path)
