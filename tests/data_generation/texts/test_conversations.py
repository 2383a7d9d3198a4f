"""Loss masks of conversations, under templates that behave as those of well-known families."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from speculators_core.data_generation.settings import DataGenConfig
from speculators_core.data_generation.texts.conversations import (
    ChatTemplate,
    Conversation,
    load_chat_template,
    load_tokenizer,
    resolve_chat_template,
)
from speculators_core.data_generation.texts.spans import RowSkipped, SkipReason
from speculators_core.errors import SpeculatorError
from tests.data_generation.texts.families import (
    FAMILIES,
    TEMPLATES,
    learned_texts,
    make_chat,
    make_tokenizer,
)

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "hello"}
HELLO_BACK = {
    "role": "assistant",
    "content": "Hello there!",
    "reasoning_content": "A greeting.",
    "thinking": "A greeting.",
}
ASKS = {"role": "user", "content": "What is the weather?"}
CALLS = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "Ask.",
    "thinking": "Ask.",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    ],
}
CALLS_TWICE = CALLS | {"tool_calls": CALLS["tool_calls"] * 2}
SUNNY = {"role": "tool", "content": "sunny"}
TELLS = {
    "role": "assistant",
    "content": "It is sunny.",
    "reasoning_content": "Tell.",
    "thinking": "Tell.",
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]

TWO_TURNS = [HELLO, HELLO_BACK, ASKS, TELLS]
WITH_SYSTEM = [SYSTEM, *TWO_TURNS]
WITH_TOOLS = [HELLO, HELLO_BACK, ASKS, CALLS, SUNNY, TELLS]

THINKS_HELLO = "<think>\nA greeting.\n</think>\n\nHello there!<|im_end|>"
THINKS_TELLS = "<think>\nTell.\n</think>\n\nIt is sunny.<|im_end|>"
THINKS_CALLS = (
    '<think>\nAsk.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": '
    '{"city": "Paris"}}\n</tool_call><|im_end|>'
)
ANALYSES_HELLO = (
    "<|channel|>analysis<|message|>A greeting.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Hello there!<|return|>"
)
ANALYSES_TELLS = (
    "<|channel|>analysis<|message|>Tell.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>It is sunny.<|return|>"
)
ANALYSES_CALLS = (
    "<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant to=functions.weather"
    '<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'
)
MISTRAL_CALLS = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>'

LEARNED = {
    ("qwen3", "two turns"): [[THINKS_TELLS], [THINKS_HELLO]],
    ("qwen3", "with system"): [[THINKS_TELLS], [THINKS_HELLO]],
    ("qwen3", "with tools"): [[THINKS_CALLS, THINKS_TELLS], [THINKS_HELLO]],
    ("llama3", "two turns"): [["Hello there!<|eot_id|>", "It is sunny.<|eot_id|>"]],
    ("llama3", "with system"): [["Hello there!<|eot_id|>", "It is sunny.<|eot_id|>"]],
    ("llama3", "with tools"): [
        [
            "Hello there!<|eot_id|>",
            '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
            "It is sunny.<|eot_id|>",
        ]
    ],
    ("gemma", "two turns"): [["Hello there!<end_of_turn>", "It is sunny.<end_of_turn>"]],
    ("mistral", "two turns"): [[" Hello there!</s>", " It is sunny.</s>"]],
    ("mistral", "with system"): [[" It is sunny.</s>"], [" Hello there!</s>"]],
    ("mistral", "with tools"): [[MISTRAL_CALLS, " It is sunny.</s>"], [" Hello there!</s>"]],
    ("gpt_oss", "two turns"): [[ANALYSES_TELLS], [ANALYSES_HELLO]],
    ("gpt_oss", "with system"): [[ANALYSES_TELLS], [ANALYSES_HELLO]],
    ("gpt_oss", "with tools"): [[ANALYSES_CALLS, ANALYSES_TELLS], [ANALYSES_HELLO]],
    ("glm", "two turns"): [["\nHello there!<|user|>", "\nIt is sunny."]],
    ("phi3", "two turns"): [["Hello there!<|end|>", "It is sunny.<|end|>"]],
}
"""What the verifier wrote in each sequence, typed by hand."""
MESSAGES = {"two turns": TWO_TURNS, "with system": WITH_SYSTEM, "with tools": WITH_TOOLS}


def make_conversation(name: str) -> Conversation:
    return Conversation(MESSAGES[name], TOOLS if name == "with tools" else None)


def check_server_law(chat: ChatTemplate, conversation: Conversation, sequences) -> None:
    """Each answer is learned once, right behind the tokens that a server would be given for it."""
    tokenizer, starts = chat.tokenizer, []
    for turn, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and turn >= conversation.num_given:
            answered = chat.render(conversation, turn + 1, prompt=False).rstrip()
            if answered == chat.render(conversation, turn, prompt=True).rstrip():
                continue  # an answer of nothing
            prompt = tokenizer.apply_chat_template(
                conversation.messages[:turn],
                tools=conversation.tools,
                chat_template=chat.template,
                add_generation_prompt=True,
                return_dict=False,
                **chat.options,
            )
            starts.append(prompt)
    found = [
        sequence.input_ids[:place]
        for sequence in sequences
        for place, learned in enumerate(sequence.loss_mask)
        if learned and not (place and sequence.loss_mask[place - 1])
    ]
    assert sorted(found) == sorted(starts)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("family, name", LEARNED)
def test_each_answer_is_learned_exactly_as_the_verifier_wrote_it(family, name, kind):
    chat, conversation = make_chat(family, kind), make_conversation(name)
    sequences = chat.tokenize(conversation)
    expected = LEARNED[family, name]
    if kind == "sentencepiece":  # whose decoder strips the space that a text begins with
        expected = [[text.removeprefix(" ") for text in texts] for texts in expected]
    assert [learned_texts(chat.tokenizer, sequence) for sequence in sequences] == expected
    check_server_law(chat, conversation, sequences)


def test_a_short_conversation_written_out():
    chat = make_chat("qwen3")
    (sequence,) = chat.tokenize(Conversation([HELLO, {"role": "assistant", "content": "world"}]))
    tokens = chat.tokenizer.convert_ids_to_tokens(sequence.input_ids)
    text, mask = " ".join(tokens).replace("Ċ", "/"), sequence.loss_mask
    given = "<|im_start|> user / hel lo <|im_end|> / <|im_start|> as sistan t /"
    learned = "< th ink > / / < / th ink > / / w or ld <|im_end|>"
    assert text == f"{given} {learned}"
    assert mask == [False] * len(given.split()) + [True] * len(learned.split())


def test_an_answer_of_nothing_is_not_learned_and_harms_no_other():
    chat, nothing = make_chat("glm"), {"role": "assistant", "content": ""}
    (sequence,) = chat.tokenize(Conversation([HELLO, nothing, ASKS, TELLS]))
    assert learned_texts(chat.tokenizer, sequence) == ["\nIt is sunny."]


def test_every_option_reaches_the_template():
    thinks, not_so = make_chat("qwen3"), make_chat("qwen3", enable_thinking=False)
    conversation = Conversation([HELLO, {"role": "assistant", "content": "world"}])
    texts = [learned_texts(c.tokenizer, *c.tokenize(conversation)) for c in (thinks, not_so)]
    assert texts == [["<think>\n\n</think>\n\nworld<|im_end|>"], ["world<|im_end|>"]]


def test_options_that_are_not_the_templates_are_refused():
    with pytest.raises(SpeculatorError, match="template_options.tokenize"):
        make_chat("qwen3", tokenize=True)


def test_an_open_conversation_ends_with_the_generation_prompt():
    chat = make_chat("llama3")
    (closed,) = chat.tokenize(Conversation([*TWO_TURNS, HELLO]))
    (is_open,) = chat.tokenize(Conversation([*TWO_TURNS, HELLO]), is_open=True)
    (prompt,) = chat.tokenize(Conversation([HELLO]), is_open=True)
    tail = "assistant<|end_header_id|>\n\n"
    assert chat.tokenizer.decode(closed.input_ids).endswith("sunny.<|eot_id|>")
    assert chat.tokenizer.decode(is_open.input_ids).endswith(tail)
    assert learned_texts(chat.tokenizer, is_open) == learned_texts(chat.tokenizer, closed)
    assert chat.tokenizer.decode(prompt.input_ids).endswith(tail) and not any(prompt.loss_mask)
    answered = Conversation(TWO_TURNS)
    assert chat.tokenize(answered, is_open=True) == chat.tokenize(answered)


def test_given_messages_are_not_learned():
    chat = make_chat("llama3")
    (sequence,) = chat.tokenize(Conversation(TWO_TURNS, num_given=2))
    assert learned_texts(chat.tokenizer, sequence) == ["It is sunny.<|eot_id|>"]


@pytest.mark.parametrize(
    "family, messages, reason, detail",
    [
        ("gemma", WITH_SYSTEM, SkipReason.TEMPLATE, "There is no system role"),
        ("gemma", [HELLO, HELLO, TELLS], SkipReason.TEMPLATE, "must take turns"),
        ("llama3", [ASKS, CALLS_TWICE], SkipReason.TEMPLATE, "one tool call"),
        ("llama3", [TELLS], SkipReason.TEMPLATE, "empty conversation"),
        ("qwen3", [HELLO, CALLS | {"tool_calls": [{"name": 5}]}], SkipReason.TEMPLATE, "str"),
        ("deepseek_r1", TWO_TURNS, SkipReason.REWRITTEN, "<think>"),
        ("llama3", [HELLO, ASKS], SkipReason.NO_ANSWER, "user, user"),
        ("glm", [HELLO, {"role": "assistant", "content": " "}], SkipReason.NO_ANSWER, "assistant"),
    ],
)
def test_what_cannot_be_exact_is_skipped_with_its_reason(family, messages, reason, detail):
    with pytest.raises(RowSkipped, match=detail) as skipped:
        make_chat(family).tokenize(Conversation(messages))
    assert skipped.value.reason is reason


def plain_tokenizer(template: str, merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """GPT-2's bytes and words, without special tokens but for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["</s>", *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", chat_template=template
    )


BORDERS = {
    "a space goes to the next word": ("A: ", [("Ġ", "h")]),
    "newlines part before a word": ("A:\n\n", [("Ċ", "Ċ")]),
    "a word goes on": ("A", [("A", "h")]),
}


@pytest.mark.parametrize("name", BORDERS)
def test_an_answer_whose_border_changes_tokens_is_learned_apart_after_the_servers_prompt(name):
    header, merges = BORDERS[name]
    template = """
        {%- for m in messages -%}
          {{ "U: " + m.content + "\n" if m.role == "user" else HEADER + m.content + "</s>" }}
        {%- endfor -%}
        {{ HEADER if add_generation_prompt }}
    """.strip().replace("HEADER", json.dumps(header))
    hi, other = ({"role": "assistant", "content": text} for text in ("hi", "x"))
    for messages, num_apart in ([HELLO, hi], 0), ([HELLO, hi, HELLO, other, HELLO, hi], 2):
        conversation = Conversation(messages)
        exact = plain_tokenizer(template, [])
        chat = ChatTemplate(exact, frozenset([exact.eos_token_id]))
        (sequence,) = chat.tokenize(conversation)
        texts = learned_texts(exact, sequence)
        merging = plain_tokenizer(template, merges)
        chat = ChatTemplate(merging, frozenset([merging.eos_token_id]))
        sequences = chat.tokenize(conversation)
        assert len(sequences) == 1 + num_apart
        learned = [text for one in sequences for text in learned_texts(merging, one)]
        assert sorted(learned) == sorted(texts)
        check_server_law(chat, conversation, sequences)


def test_special_tokens_that_take_the_space_behind_them_leave_exact_masks():
    tokenizer = make_tokenizer.__wrapped__("phi3")
    greedy = [AddedToken(t, rstrip=True, special=True) for t in ("<|assistant|>", "<|end|>")]
    tokenizer.add_tokens(greedy, special_tokens=True)
    chat = ChatTemplate(tokenizer, make_chat("phi3").stop_ids)
    assert len(tokenizer("<|end|> \n", add_special_tokens=False)["input_ids"]) == 1
    (sequence,) = chat.tokenize(Conversation(TWO_TURNS))
    assert learned_texts(tokenizer, sequence) == LEARNED["phi3", "two turns"][0]
    with pytest.raises(RowSkipped) as skipped:
        chat.tokenize(Conversation([HELLO, {"role": "assistant", "content": " hi"}]))
    assert skipped.value.reason is SkipReason.BORDER


def test_an_answer_that_shares_a_token_with_what_follows_is_skipped():
    template = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    template += "{{ 'assistant:' if add_generation_prompt }}"
    conversation = Conversation([HELLO, {"role": "assistant", "content": "hi"}, HELLO, TELLS])
    exact = plain_tokenizer(template, [])
    (sequence,) = ChatTemplate(exact, frozenset()).tokenize(conversation)
    assert learned_texts(exact, sequence) == ["hi", "It is sunny."]
    with pytest.raises(RowSkipped) as skipped:
        ChatTemplate(plain_tokenizer(template, [("i", "u")]), frozenset()).tokenize(conversation)
    assert skipped.value.reason is SkipReason.BORDER


SNIPPETS = st.sampled_from(
    [
        " ",
        "\n",
        "\n\n",
        "\t",
        "a",
        "bc",
        ".",
        ",",
        "é",
        "漢",
        "<",
        "|>",
        "<|im_end|>",
        "</s>",
        "[INST]",
    ]
)
CONTENTS = st.lists(SNIPPETS, max_size=5).map("".join)


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    texts=st.lists(CONTENTS, min_size=2, max_size=6),
    thoughts=CONTENTS,
)
@settings(max_examples=300, deadline=None, database=None)
def test_whatever_is_said_masks_are_exact_or_the_conversation_is_skipped(family, texts, thoughts):
    roles = ("user", "assistant")
    messages = [
        {"role": roles[place % 2], "content": text, "thinking": thoughts}
        for place, text in enumerate(texts)
    ]
    chat, conversation = make_chat(family), Conversation(messages)
    try:
        sequences = chat.tokenize(conversation)
    except RowSkipped:
        return
    check_server_law(chat, conversation, sequences)
    for sequence in sequences:
        for text in learned_texts(chat.tokenizer, sequence):
            ends = [text.find(stop) + len(stop) for stop in chat.stop_tokens if stop in text]
            assert min(ends, default=len(text)) == len(text)


# ---- what a configuration names ----


@pytest.fixture(scope="module")
def verifier_folder(tmp_path_factory):
    """Phi-3's kind: the tokenizer's own stop token is not what ends a turn."""
    folder = tmp_path_factory.mktemp("verifier")
    tokenizer = make_tokenizer("phi3")
    tokenizer.save_pretrained(folder)
    stops = tokenizer.convert_tokens_to_ids(list(FAMILIES["phi3"].stops))
    GenerationConfig(eos_token_id=stops).save_pretrained(folder)
    return folder


def config_for(folder, **options) -> DataGenConfig:
    return DataGenConfig(verifier=str(folder), datasets=({"path": "a.jsonl"},), **options)


def learned_of(data: DataGenConfig, messages=TWO_TURNS) -> list[str]:
    tokenizer = load_tokenizer(data)
    chat = load_chat_template(data, tokenizer)
    (sequence,) = chat.tokenize(Conversation(messages))
    return learned_texts(tokenizer, sequence)


def test_the_generation_config_says_what_ends_an_answer(verifier_folder, tmp_path):
    with_it = learned_of(config_for(verifier_folder))
    assert with_it == ["Hello there!<|end|>", "It is sunny.<|end|>"]
    make_tokenizer("llama3").save_pretrained(tmp_path)
    stops_early = [HELLO, {"role": "assistant", "content": "It is<|eot_id|> sunny."}]
    without = learned_of(config_for(tmp_path), stops_early)
    assert without == ["It is<|eot_id|>"]


def test_tokenizer_options_override_the_tokenizers_own(verifier_folder):
    data = config_for(verifier_folder, tokenizer_options={"eos_token": "<|system|>"})
    assert load_tokenizer(data).eos_token == "<|system|>"
    assert load_tokenizer(config_for(verifier_folder)).eos_token == "<|endoftext|>"


@pytest.mark.parametrize("given", ["inline", "file", "folder"])
def test_a_chat_template_is_jinja_or_a_file_or_a_tokenizer_that_has_one(
    given, verifier_folder, tmp_path
):
    text = (
        (TEMPLATES / "phi3.jinja").read_text().replace("message.content", "message.content | upper")
    )
    if given == "file":
        (tmp_path / "chat.jinja").write_text(text)
    if given == "folder":
        other = make_tokenizer("phi3")
        other.save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(text)
    name = {"inline": text, "file": str(tmp_path / "chat.jinja"), "folder": str(tmp_path)}[given]
    assert resolve_chat_template(name) == text
    data = config_for(verifier_folder, chat_template=name)
    assert learned_of(data) == ["HELLO THERE!<|end|>", "IT IS SUNNY.<|end|>"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.jinja", "does not exist"),
        ("no-such/tokenizer", "cannot be loaded"),
        ("without", "no chat template"),
    ],
)
def test_a_chat_template_that_is_not_there_is_one_line(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = make_tokenizer("phi3")
    bare.save_pretrained(tmp_path / "without")
    (tmp_path / "without" / "chat_template.jinja").unlink()
    with pytest.raises(SpeculatorError, match=message) as error:
        resolve_chat_template(name)
    assert "\n" not in str(error.value)


def test_a_template_that_is_no_jinja_is_the_users_fault():
    chat = ChatTemplate(make_tokenizer("phi3"), frozenset(), template="{% for %}")
    with pytest.raises(SpeculatorError, match=r"not valid Jinja: line 1"):
        chat.tokenize(Conversation(TWO_TURNS))


def test_a_template_cannot_reach_beyond_its_sandbox():
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    chat = ChatTemplate(make_tokenizer("phi3"), frozenset(), template=escape)
    with pytest.raises(RowSkipped, match="unsafe"):
        chat.tokenize(Conversation(TWO_TURNS))


def test_a_verifier_without_a_template_has_none(tmp_path):
    make_tokenizer("phi3").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    data = config_for(tmp_path)
    assert load_chat_template(data, load_tokenizer(data)) is None


def test_code_of_a_verifier_runs_only_where_it_is_trusted(tmp_path):
    make_tokenizer("phi3").save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    is_ours = True\n"
    )
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SpeculatorError, match="cannot be loaded"):
        load_tokenizer(config_for(tmp_path))
    assert load_tokenizer(config_for(tmp_path, trust_remote_code=True)).is_ours
