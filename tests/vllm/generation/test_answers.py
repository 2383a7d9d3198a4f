"""A real vLLM answers conversations: in this process, and as a server."""

import json
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from speculators_core.data_generation.answers.dialogues import Dialogue, Tally
from speculators_core.data_generation.answers.regenerate import AnswerMeter
from speculators_core.data_generation.answers.settings import AnswersConfig
from speculators_core.errors import SpeculatorError
from speculators_vllm.generation.answers import VLLMAnswerer
from tests.conftest import make_verifier
from tests.data_generation.answers.chat_server import Run
from tests.vllm.serving import SMALL, server, write_tokenizer

pytestmark = pytest.mark.vllm

END_IDS = [30, 50, 108]
MAX_TOKENS = 24
NUM_TURNS = (3, 1, 2, 1, 2, 3, 1, 2)
"""Of each conversation: some go on while others have ended."""
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def asked(number, turn):
    return {"role": "user", "content": f"{20 + number} {40 + turn} {60 + number * turn}"}


@pytest.fixture(scope="module")
def verifier():
    """It ends some of its texts, by tokens that are no special ones of its tokenizer."""
    return make_verifier(**SMALL | {"initializer_range": 0.08, "eos_token_id": END_IDS})


@pytest.fixture(scope="module")
def folder(verifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verifier")
    verifier.save_pretrained(folder)
    write_tokenizer(folder, SMALL["vocab_size"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(MARKS))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    old = {"role": "assistant", "content": "old"}
    run = Run(tmp_path)
    run.write(
        {"messages": [message for turn in range(turns) for message in (asked(n, turn), old)]}
        for n, turns in enumerate(NUM_TURNS)
    )
    return run


@pytest.fixture(scope="module")
def expected(verifier, folder):
    """What Transformers writes, greedily, turn after turn; a cut answer is the last."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def converse(number, turns):
        messages = []
        for turn in range(turns):
            messages.append(asked(number, turn))
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            settings = {"do_sample": False, "max_new_tokens": MAX_TOKENS, "pad_token_id": 0}
            text = verifier.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            written = text[0, ids.shape[1] :]
            is_whole = int(written[-1]) in END_IDS
            answer = tokenizer.decode(written[:-1] if is_whole else written)
            messages.append({"role": "assistant", "content": answer})
            if not is_whole:
                break
        return messages

    texts = [converse(*numbered) for numbered in enumerate(NUM_TURNS)]
    lengths = [len(messages) for messages in texts]
    assert max(lengths) == 6 and lengths != [2 * turns for turns in NUM_TURNS]
    return texts


def conversations(run):
    """Without the space that vLLM puts before the first word of this tokenizer."""
    return [
        [message | {"content": message["content"].strip()} for message in line["messages"]]
        for line in run.lines()
    ]


def test_greedy_answers_are_those_of_transformers(run, folder, expected):
    options = {"verifier": str(folder), "dtype": "float32", "max_tokens": MAX_TOKENS}
    run(None, **options, cut="keep", batch_size=3)
    assert conversations(run) == expected


@pytest.mark.slow
def test_a_server_answers_as_the_engine_in_this_process(run, folder, expected):
    with server(run.folder / "log", str(folder), "--max-model-len", "512") as url:
        run(None, url=url, max_tokens=MAX_TOKENS, cut="keep", concurrency=3)
        assert conversations(run) == expected
        run.output = run.folder / "refused.jsonl"
        run([{"prompt": "9 " * 600}, {"prompt": "9"}], url=url, max_tokens=1, cut="keep")
        assert "HTTP 400" in run.aside()["0/0"] and len(run.lines()) == 1


@pytest.fixture(scope="module")
def answerer(folder):
    """Draws its words, and tells thoughts and calls apart."""
    sampling = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 8, "seed": 1}
    offline = {
        "engine_args": {"max_model_len": 64},
        "batch_size": 2,
        "reasoning_parser": "deepseek_r1",
        "tool_call_parser": "hermes",
    }
    config = {"verifier": str(folder), "sampling": sampling, "offline": offline}
    with closing(VLLMAnswerer(AnswersConfig.model_validate(config))) as answerer:
        yield answerer


def drawn(answerer, **sampling):
    """What it answers with these options, for three conversations."""
    config = answerer._chat.sampling
    answerer._chat.sampling = config.model_copy(update=sampling)
    try:
        given = (
            Dialogue(f"0/{n}", [asked(0, 0)], seed=answerer._chat.sampling.seed, keeps_cut=True)
            for n in range(3)
        )
        return [json.dumps(dialogue.messages) for dialogue in answerer.answer(given)]
    finally:
        answerer._chat.sampling = config


def test_drawn_answers_are_the_same_in_each_run_and_follow_the_options(answerer):
    first = drawn(answerer)
    assert first == drawn(answerer) and len(set(first)) == 3
    assert len({*first, *drawn(answerer, seed=2)}) == 6
    greedy = drawn(answerer, temperature=0.0)
    assert len(set(greedy)) == 1
    assert drawn(answerer, top_k=1) == drawn(answerer, top_p=1e-6) == greedy
    assert len(drawn(answerer, max_tokens=1)[0]) < len(first[0])


class Recorder(Tally):
    """Keeps the numbers of tokens under way."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "num_under_way":
            self.__dict__.setdefault("seen", []).append(value)


def test_tokens_count_while_their_answers_are_written(answerer):
    tally = Recorder()
    given = [Dialogue(f"0/{n}", [asked(0, 0)], keeps_cut=True, tally=tally) for n in range(2)]
    list(answerer.answer(iter(given)))
    assert len(set(tally.seen)) > 5 and max(tally.seen) == tally.num_tokens
    assert tally.num_under_way == 0
    meter = AnswerMeter(None, 0)
    meter.tally.num_under_way = 5
    assert "5 tokens" in meter.line()


def test_what_vllm_refuses_ends_that_conversation_alone(answerer):
    long = [{"role": "user", "content": "9 " * 80}]
    given = [Dialogue("0/0", long), Dialogue("0/1", [asked(0, 0)], keeps_cut=True)]
    refused, answered = answerer.answer(iter(given))
    assert refused.has_failed and "64" in refused.fault
    assert answered.fault is None and answered.num_tokens == 8


@pytest.mark.parametrize("tools", [None, [{"name": "clock"}]])
def test_thoughts_calls_and_content_are_separated(answerer, tools):
    one = Dialogue("0/0", [asked(0, 0), {"role": "assistant"}, asked(0, 1)], tools)
    text = '<think>hm</think>so<tool_call>{"name": "clock", "arguments": {"h": 1}}</tool_call>'
    output = SimpleNamespace(
        text=text, token_ids=answerer._chat.tokenizer(text)["input_ids"], finish_reason="stop"
    )
    answer = answerer._chat.reader(one).read(output)
    assert answer.reasoning == "hm" and answer.content.startswith("so")
    called = [(call.name, json.loads(call.arguments)) for call in answer.calls]
    assert called == ([("clock", {"h": 1})] if tools else [])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"reasoning_parser": "nothing"}, "--reasoning-parser.*nothing"),
        ({"tool_call_parser": "nothing"}, "--tool-call-parser.*nothing"),
        ({"engine_args": {"model": "x"}}, "--engine-args model: this command decides it"),
        ({"engine_args": {"max_modle_len": 5}}, "Did you mean 'max_model_len'"),
    ],
)
def test_options_that_vllm_does_not_take_are_refused(folder, options, complaint):
    config = AnswersConfig.model_validate({"verifier": str(folder), "offline": options})
    with pytest.raises(SpeculatorError, match=complaint):
        VLLMAnswerer(config)


def test_a_verifier_without_chat_template_is_refused(answerer, monkeypatch):
    monkeypatch.setattr(answerer._chat.tokenizer, "chat_template", None)
    with pytest.raises(SpeculatorError, match=r"verifier\d+ has no chat template"):
        answerer._chat.check_template()
