"""The verifier's answers in place of the assistant's, from a server of OpenAI's protocol."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from benchmarks import playground
from speculators_core.cli import main
from speculators_core.data_generation.answers.dialogues import Answer, Call, Dialogue
from speculators_core.data_generation.answers.regenerate import regenerate
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.data_generation.texts.sources import Counts, read_plan_examples
from speculators_core.errors import SpeculatorError
from speculators_core.http import FIRST_PAUSE_S
from tests.data_generation.answers.chat_server import Run, chat_server, echo, last, says

COMMAND = str(Path(sys.executable).with_name("speculators"))
PLAYGROUND = Path(playground.__file__).parent / "checkpoints" / "verifier"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Copies of data sets go here, no proxy stands between, and no key is about."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.fixture
def server():
    with chat_server() as server:
        yield server


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text, **more):
    return {"role": "tool", "content": text, **more}


def calling(*names):
    return [
        {"id": f"id{number}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for number, name in enumerate(names)
    ]


def chat(text, turns=1):
    return {
        "messages": [
            message for turn in range(turns) for message in (user(f"{text}{turn}"), said("old"))
        ]
    }


def chats(number, turns=1):
    return [chat(f"hi {i}.", turns) for i in range(number)]


# ---- what is asked and kept ----


def test_every_answer_is_the_verifiers_and_is_seen_by_the_next(run, server):
    system = {"role": "system", "content": "be brief"}
    report = run([{"messages": [system, *chat("q", turns=3)["messages"]]}], server.url)
    asked = [system, user("q0"), said("2:q0"), user("q1"), said("4:q1"), user("q2")]
    assert [body["messages"] for body in server.bodies] == [asked[:2], asked[:4], asked]
    assert run.lines() == [{"key": "0/0", "messages": [*asked, said("6:q2")], "tools": None}]
    assert (report.num_conversations, report.num_answers, report.num_tokens) == (1, 3, 9)


@pytest.mark.parametrize(
    ("row", "kept"),
    {
        "a prompt alone": ({"prompt": "q"}, [user("q"), said("1:q")]),
        "a prompt with its completion": (
            {"prompt": "q", "completion": "old"},
            [user("q"), said("1:q")],
        ),
        "both as messages": (
            {"prompt": chat("a")["messages"] + [user("b")], "completion": [said("old")]},
            [user("a0"), said("1:a0"), user("b"), said("3:b")],
        ),
        "under other names": (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "old"}]},
            [user("q"), said("1:q")],
        ),
        "open at the end": (
            {"messages": [*chat("a")["messages"], user("b")]},
            [user("a0"), said("1:a0"), user("b"), said("3:b")],
        ),
        "the assistant first": (
            {"messages": [said("welcome"), *chat("a")["messages"]]},
            [user("a0"), said("1:a0")],
        ),
        "answers in a row": (
            {"messages": [user("a"), said("x"), said("y"), user("b"), said("z")]},
            [user("a"), said("1:a"), user("b"), said("3:b")],
        ),
    }.values(),
    ids=lambda value: "",
)
def test_rows_become_conversations(run, server, row, kept):
    run([row], server.url)
    assert [line["messages"] for line in run.lines()] == [kept]


def test_tools_and_names_go_along_and_other_keys_do_not(run, server):
    message = {**user("q"), "name": "ann", "weight": 3}
    bare = {"name": "clock", "parameters": {"type": "object"}}
    run([{"messages": [message], "tools": json.dumps([TOOL, bare])}], server.url)
    whole = [TOOL, {"type": "function", "function": bare}]
    assert server.bodies[0]["tools"] == whole == run.lines()[0]["tools"]
    assert server.bodies[0]["messages"] == [{**user("q"), "name": "ann"}]


def test_template_options_of_a_row_win_and_are_kept_for_generate_data(run, server):
    own = {"thinking": True, "style": {"of": [1]}}
    rows = [{**chat("q"), "chat_template_kwargs": own}, chat("r")]
    run(rows, server.url, template_options={"thinking": False, "n": 1})
    asked = [body["chat_template_kwargs"] for body in server.bodies]
    assert sorted(asked, key=len) == [{"thinking": False, "n": 1}, {**own, "n": 1}]
    assert [line.get("chat_template_kwargs") for line in run.lines()] == [own, None]


def test_template_options_that_are_no_object_set_their_row_aside(run, server):
    run([chat("q"), {**chat("r"), "chat_template_kwargs": [1]}], server.url)
    assert run.aside() == {
        "0/1": "not what its columns promise: expected an object of template options, found [1]"
    }


def test_thoughts_are_kept_beside_the_answer(run, server):
    for field in ("reasoning", "reasoning_content"):
        server.reply = lambda body, field=field: says("a", **{field: "hm"})
        run([chat("q", 2)], server.url, output=run.folder / field)
        run.output = run.folder / field
        assert run.lines()[0]["messages"][1] == said("a", reasoning_content="hm")
        assert server.bodies[-1]["messages"][1]["reasoning_content"] == "hm"


def test_generate_data_takes_what_comes_out(run, server):
    def reply(body):
        return (
            says("", reasoning="hm", tool_calls=calling("weather"))
            if last(body) == "t"
            else echo(body)
        )

    server.reply = reply
    given = [*chats(3, turns=2), {"messages": [user("t")], "tools": json.dumps([TOOL])}]
    run(given, server.url)
    content = {
        "data": {"verifier": str(PLAYGROUND), "datasets": [{"path": str(run.output)}]},
        "sync": {"path": str(run.folder / "store")},
        "run": {"allowed_roots": [str(run.folder)]},
    }
    counts = Counts()
    examples = list(read_plan_examples(GenerationPlan.read(content, "test"), counts))
    assert [example.key for example in examples] == ["0/0", "0/1", "0/2", "0/3"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PLAYGROUND)
    learned = tokenizer.decode(examples[1].input_ids[examples[1].loss_mask])
    assert learned == "1:hi 1.0<|im_end|>3:hi 1.1<|im_end|>"


# ---- where a conversation goes on ----

CALLS = {"tool_calls": calling("weather", "clock")}
RESULTS = [tool("rain", tool_call_id="old0"), tool("noon", tool_call_id="old1", name="clock")]
TOOLED = [user("q"), said("", **CALLS), *RESULTS, said("old"), user("thanks"), said("old")]


def dialogue(messages=TOOLED, **options):
    return Dialogue("0/7", messages, **options)


def answer(*names, **options):
    return Answer("a", calls=tuple(Call(name, "{}") for name in names), **options)


def test_results_follow_the_calls_they_answer_under_their_ids():
    one = dialogue()
    one.take(answer("weather", "clock"))
    ids = [call["id"] for call in one.messages[1]["tool_calls"]]
    assert len(set(ids)) == 2 and all(len(i) == 9 and i.isalnum() for i in ids)
    assert one.is_open and one.messages[2:] == [
        tool("rain", tool_call_id=ids[0]),
        tool("noon", tool_call_id=ids[1], name="clock"),
    ]
    one.take(answer())
    assert one.is_open and one.messages[-1] == user("thanks")
    one.take(answer())
    assert not one.is_open and one.num_answers == 3 and one.fault is None


def test_ids_that_the_verifier_wrote_are_kept():
    one = dialogue()
    one.take(Answer("", calls=(Call("weather", "{}", "w:0"), Call("clock", "{}", "c:1"))))
    assert [message["tool_call_id"] for message in one.messages[2:]] == ["w:0", "c:1"]


@pytest.mark.parametrize(
    ("messages", "names"),
    {
        "results without a call": (TOOLED, []),
        "more results than calls": (TOOLED, ["weather"]),
        "fewer results than calls": (TOOLED, ["weather", "clock", "clock"]),
        "calls of other tools": (TOOLED, ["clock", "weather"]),
        "a call without a result": (chat("q", 2)["messages"], ["weather"]),
        "a call at the end": ([user("q")], ["weather"]),
    }.values(),
    ids=lambda value: "",
)
def test_an_answer_that_does_not_fit_what_follows_is_the_last(messages, names):
    one = dialogue(messages)
    one.take(answer(*names))
    assert not one.is_open and one.fault is None
    assert [message["role"] for message in one.messages] == ["user", "assistant"]


def test_results_fit_calls_that_the_data_did_not_write_as_such():
    one = dialogue([user("q"), said("<call>weather</call>"), tool("rain"), said("old")])
    one.take(answer("weather"))
    assert one.is_open and one.messages[-1]["content"] == "rain"


@pytest.mark.parametrize(
    ("keeps_cut", "roles"), [(False, ["user", "assistant"]), (True, ["user", "assistant"] * 2)]
)
def test_a_cut_answer_ends_the_conversation(keeps_cut, roles):
    one = dialogue(chat("q", 3)["messages"], keeps_cut=keeps_cut)
    one.take(answer())
    one.take(answer(is_cut=True))
    assert not one.is_open and one.fault is None
    assert [message["role"] for message in one.messages] == roles


@pytest.mark.parametrize("messages", [[], [{"role": "system", "content": "s"}], [said("hi")]])
def test_where_nobody_asks_there_is_nothing_to_answer(messages):
    one = dialogue(messages)
    assert not one.is_open and one.fault == "nobody asks anything in it"


def test_each_answer_has_a_seed_of_its_own_which_is_the_same_in_each_run():
    def seeds(key, seed):
        one = Dialogue(key, chat("q", 3)["messages"], seed=seed)
        found = []
        while one.is_open:
            found.append(one.seed)
            one.take(answer())
        return found

    first = seeds("0/1", 0)
    assert first == seeds("0/1", 0)
    assert len({*first, *seeds("0/2", 0), *seeds("0/1", 1)}) == 9
    assert all(0 <= seed < 2**31 for seed in first)


# ---- what is set aside ----


def test_cut_answers_are_dropped_or_kept(run, server):
    server.reply = lambda body: says("a", "length" if last(body) in ("x0", "y1") else "stop")
    rows = [chat("x", 2), chat("y", 2), chat("z", 2)]
    report = run(rows, server.url)
    assert run.aside() == {"0/0": "its first answer was cut at max_tokens"}
    assert [len(line["messages"]) for line in run.lines()] == [2, 4]
    assert report.num_conversations == 2
    assert report.set_aside == {"its first answer was cut at max_tokens": 1}
    run.output = run.folder / "kept.jsonl"
    run(rows, server.url, cut="keep")
    assert [len(line["messages"]) for line in run.lines()] == [2, 4, 4] and run.aside() == {}


def test_a_refused_conversation_is_set_aside_alone(run, server):
    def reply(body):
        if last(body) == "b":
            return 400, {"error": "too long"}
        return (500, {"error": "broken"}) if last(body) == "d" else echo(body)

    server.reply = reply
    run([{"prompt": text} for text in "abcde"], server.url, retries=1, max_failures=2)
    assert [line["key"] for line in run.lines()] == ["0/0", "0/2", "0/4"]
    aside = run.aside()
    assert "HTTP 400" in aside["0/1"] and "too long" in aside["0/1"]
    assert "HTTP 500" in aside["0/3"]
    assert Counter(map(last, server.bodies)) == Counter("abcdde")


def test_an_answer_that_the_server_gave_up_is_set_aside(run, server):
    server.reply = lambda body: says("a", "content_filter")
    run([chat("q")], server.url)
    assert run.aside() == {"0/0": "the server ended an answer: content_filter"}


def test_too_many_failures_end_the_run_and_are_not_asked_again(run, server):
    server.reply = lambda body: (400, {}) if "hi 1" in last(body) else echo(body)
    rows = chats(20)
    with pytest.raises(SpeculatorError, match=r"3 conversations .* --max-failures \(2\).*0/11: "):
        run(rows, server.url, max_failures=2, concurrency=1)
    assert list(run.aside()) == ["0/1", "0/10", "0/11"]
    server.bodies.clear()
    run(rows, server.url, resume=True)
    assert len(run.lines()) == 9 and len(run.aside()) == 11
    assert last(server.bodies[0]) == "hi 12.0"


@pytest.mark.parametrize("first", ["kept", "refused"])
def test_the_last_line_counts_what_was_set_aside_and_an_empty_output_is_exit_code_1(
    run, server, capsys, first
):
    def reply(body):
        if last(body) == "kept":
            return echo(body)
        return 400, {"error": f"{len(last(body))} tokens are too many"}

    server.reply = reply
    rows = run.write([{"prompt": text} for text in (first, "hello", "you", "there")])
    command = ["regenerate", str(rows), "--base-url", server.url, "--output", str(run.output)]
    for resume in ([], ["--resume"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--allowed-roots", str(run.folder), *resume])
        kept = first == "kept"
        assert ended.value.code == (0 if kept else 1)
        said = " ".join(capsys.readouterr().out.split())
        assert f"{4 - kept} rows: " in said and "tokens are too many" in said
        assert ("wrote" in said) == (kept and not resume)
        assert ("is empty; all were set aside" in said) == (not kept)


def test_rows_that_cannot_be_read_are_set_aside_and_do_not_end_the_run(run, server):
    rows = [{"messages": []}, {"messages": [{"role": "user", "content": 3}]}, chat("q")]
    run([{"messages": json.dumps(row["messages"])} for row in rows], server.url, max_failures=0)
    assert [line["key"] for line in run.lines()] == ["0/2"]
    assert list(run.aside()) == ["0/0", "0/1"] and "content that is text" in run.aside()["0/1"]


@pytest.mark.parametrize("number", [3, 150])
def test_a_column_of_which_no_row_can_be_read_is_refused_and_nothing_kept(run, server, number):
    rows = [{"messages": "hello", "turns": [user("q")]}] * number
    with pytest.raises(SpeculatorError, match=f"None of the first {min(number, 100)} rows"):
        run(rows, server.url)
    assert server.bodies == []
    run(rows, server.url, data={"columns": {"messages": "turns"}})
    assert len(run.lines()) == number


@pytest.mark.parametrize(
    ("row", "complaint"),
    [({"text": "x"}, "plain text"), ({"input_ids": [1]}, "token ids"), ({"a": "b"}, "columns a;")],
)
def test_other_data_is_refused(run, server, row, complaint):
    with pytest.raises(SpeculatorError, match=complaint):
        run([row], server.url)


# ---- the server ----


def test_lines_come_in_the_order_of_the_data_and_no_more_than_asked_at_one_time(run, server):
    def reply(body):
        time.sleep(draw.uniform(0, 0.02) + 0.2 * ("hi 0." in last(body)))
        return echo(body)

    draw = random.Random(0)
    server.reply = reply
    run(chats(60, turns=2), server.url, concurrency=5)
    assert [line["key"] for line in run.lines()] == [f"0/{number}" for number in range(60)]
    assert server.most_at_once == 5


def test_no_more_rows_are_taken_than_the_oldest_conversation_lets(run, server):
    held, early = threading.Event(), []

    def reply(body):
        early.append(0 if held.is_set() else int(last(body).split()[1][:-2]))
        if last(body) == "hi 0.0":
            assert held.wait(10)
        elif last(body) == "hi 7.0":  # the last that is taken: 4 for each of 2
            threading.Timer(0.2, held.set).start()
        return echo(body)

    server.reply = reply
    run(chats(30), server.url, concurrency=2)
    assert len(run.lines()) == 30 and max(early) == 7


@pytest.mark.parametrize("trouble", [(429, {}), (503, {}), (500, {}), (408, {}), None])
def test_a_busy_server_is_asked_again(run, server, trouble):
    fails = iter([True, True])
    server.reply = lambda body: trouble if next(fails, False) else echo(body)
    report = run([chat("q")], server.url, retries=2)
    assert len(server.bodies) == 3 and len(run.lines()) == 1
    assert report.seconds > 0.5 * (FIRST_PAUSE_S + 2 * FIRST_PAUSE_S)


def test_a_silent_server_is_asked_again(run, server):
    has_given_up = threading.Event()
    silent = {1, 3}  # requests by number

    def reply(body):
        if len(server.bodies) in silent:
            has_given_up.wait(60)
        return echo(body)

    server.reply = reply
    run([chat("q")], server.url, retries=1, timeout_s=1.5)
    assert len(server.bodies) == 2 and len(run.lines()) == 1
    run.output.unlink()
    with pytest.raises(SpeculatorError, match="no answer in time.*--timeout-s"):
        run(None, server.url, retries=0, timeout_s=1.5)
    has_given_up.set()


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [
        ((429, {"error": "slow\ndown"}), r'HTTP 429: \{"error": "slow\\ndown"\}'),
        (None, "disconnected"),
        ((401, {}), "HTTP 401.*--api-key"),
        ((404, {}), "HTTP 404"),
        ((307, {}), "HTTP 307"),
        (
            (200, {"choices": []}),
            "not an answer of a server that speaks OpenAI's protocol: choices",
        ),
        ((200, "x" * 2**25), "an answer of over"),
    ],
)
def test_what_every_conversation_would_meet_ends_the_run_and_sets_nothing_aside(
    run, server, trouble, complaint
):
    server.reply = lambda body: trouble if "hi 3." in last(body) else echo(body)
    rows = chats(12)
    with pytest.raises(SpeculatorError, match=complaint):
        run(rows, server.url, retries=0, concurrency=2)
    assert [line["key"] for line in run.lines()] == ["0/0", "0/1", "0/2"] and run.aside() == {}
    server.reply = echo
    run(rows, server.url, resume=True)
    assert len(run.lines()) == 12


def test_a_server_that_is_not_there_is_one_line(run):
    with pytest.raises(SpeculatorError, match="http://127.0.0.1:9/v1/models: .*"):
        run([chat("q")], "http://127.0.0.1:9", retries=0)


def test_the_model_is_named_or_the_only_one(run, server):
    def asked(**options):
        run.output.unlink(missing_ok=True)
        run([chat("q")], server.url, **options)
        return server.bodies[-1]["model"]

    assert asked() == "tiny"
    assert asked(verifier="some/verifier") == "some/verifier"
    assert asked(verifier="some/verifier", model="served") == "served"
    server.models = ["one", "two"]
    run.output.unlink()
    with pytest.raises(
        SpeculatorError, match=r"2 models \(one, two\), expected one. Choose one with --model"
    ):
        run(None, server.url)


DEFAULTS = {"model": "tiny", "temperature": 0.0, "top_p": 1.0, "max_tokens": 1024}


@pytest.mark.parametrize(
    ("options", "stated"),
    [
        ({}, {}),
        ({"temperature": 0.5}, {"temperature": 0.5, "seed": Dialogue("0/0", [user("q0")]).seed}),
        (
            {"temperature": 0.5, "seed": 3},
            {"temperature": 0.5, "seed": Dialogue("0/0", [user("q0")], seed=3).seed},
        ),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"template_options": {"a": True}}, {"chat_template_kwargs": {"a": True}}),
    ],
)
def test_sampling_options_reach_the_server_and_others_are_left_to_it(run, server, options, stated):
    run([chat("q")], server.url, **options)
    [body] = server.bodies
    assert body.pop("messages") == [user("q0")]
    assert body == DEFAULTS | stated


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"engine": "openai"}, "endpoint.base_url is missing"),
        ({"engine": "nothing"}, "unknown engine 'nothing'; known: openai, transformers, vllm"),
        ({"engine": "vllm"}, "needs --verifier"),
        ({"url": "http://h/v1", "engine": "vllm", "verifier": "v"}, "is for engine openai"),
        (
            {"url": "http://h/v1", "dtype": "float32"},
            "dtype is 'float32', but the server at",
        ),
        (
            {"url": "http://h/v1", "tool_call_parser": "x"},
            "tool_call_parser is 'x', but the server",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(run, options, complaint):
    with pytest.raises(SpeculatorError, match=complaint):
        run([chat("q")], **options)


@pytest.mark.parametrize("url", ["http://me:key@host/v1", "host:80", "http://host/v1?key=a@b"])
def test_a_key_is_no_part_of_the_address(run, url):
    with pytest.raises(ValueError, match="base_url"):
        run([chat("q")], url)


@pytest.mark.parametrize("is_flag", [True, False])
def test_the_key_reaches_the_server_and_nothing_else(run, server, is_flag, monkeypatch, capfd):
    key = "sk-secret"
    if not is_flag:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    run.write([chat("q"), chat("r"), chat("s")])

    def reply(body):
        status = {"q0": 400, "r0": 200, "s0": 401}[last(body)]
        return echo(body) if status == 200 else (status, {"error": f"of {key}"})

    server.reply = reply
    flags = ["--api-key", key] if is_flag else []
    with pytest.raises(SystemExit):
        arguments = [str(run.folder / "rows.jsonl"), "--output", str(run.output), *flags]
        main(["regenerate", *arguments, "--base-url", server.url])
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    assert "of ***" in run.aside()["0/0"] and len(run.lines()) == 1
    told = capfd.readouterr()
    assert "HTTP 401" in told.err and key not in told.err + told.out
    for path in run.folder.glob("answers*"):
        assert key not in path.read_text(), path


# ---- going on ----


def test_a_killed_run_goes_on_to_the_same_file(run, server):
    """In the middle of a conversation, and with a line that was half written."""

    def reply(body):
        time.sleep(draw.uniform(0, 0.01))
        drawn = f"call_{draw.random()}"
        calls = [{**calling("weather")[0], "id": drawn}] if len(body["messages"]) == 1 else None
        return says(f"{len(body['messages'])}ü:{last(body)}", tool_calls=calls)

    draw = random.Random(0)
    server.reply = reply
    old = {"role": "assistant", "content": "", "tool_calls": calling("weather")}
    rows = [
        {"messages": [user(f"{number}"), old, tool("rain"), said("old")]} for number in range(100)
    ]
    run(rows, server.url)
    undisturbed, output = run.output.read_bytes(), run.folder / "killed.jsonl"
    flags = ("--output", output, "--base-url", server.url, "--concurrency", 2)
    command = [COMMAND, "regenerate", *map(str, (run.folder / "rows.jsonl", *flags))]
    with subprocess.Popen(command) as process:
        while not output.exists() or output.read_bytes().count(b"\n") < 20:
            time.sleep(0.01)
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    whole = output.read_bytes()
    assert undisturbed.startswith(whole) and whole != undisturbed
    output.write_bytes(undisturbed[: len(whole) + 30] + bytes(50) + b"\nzeros of a power cut")
    server.bodies.clear()
    run.output = output
    report = run(None, server.url, resume=True)
    assert output.read_bytes() == undisturbed
    assert report.num_of_earlier_runs == whole.count(b"\n")
    kept = [f"{number}" for number in range(report.num_of_earlier_runs)]
    assert not {body["messages"][0]["content"] for body in server.bodies} & set(kept)


def test_an_output_that_is_there_is_refused_and_with_resume_gone_on_with(run, server):
    rows = chats(6)
    run(rows, server.url, data={"limit": 4})
    with pytest.raises(SpeculatorError, match="already exists. Pass --resume to append"):
        run(rows, server.url)
    report = run(rows, server.url, resume=True)
    assert len(run.lines()) == 6 and (report.num_conversations, report.num_of_earlier_runs) == (
        2,
        4,
    )


def test_a_run_of_which_nothing_is_left_asks_nobody(run, server):
    run(chats(2), server.url)
    report = run(None, "http://127.0.0.1:9", resume=True, retries=0)
    assert (report.num_conversations, report.num_of_earlier_runs) == (0, 2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.5}, "answers.sampling.temperature 0.0, but it is now 0.5"),
        ({"template_options": {"a": 1}}, "template_options.a None, but it is now 1"),
        ({"cut": "keep"}, "cut 'drop', but it is now 'keep'"),
        ({"model": "other"}, "model None, but it is now 'other'"),
        ({"data": {"split": "train[:1]"}}, "data.split 'train', but it is now"),
    ],
)
def test_going_on_with_other_options_is_refused(run, server, options, named):
    run(chats(2), server.url)
    with pytest.raises(SpeculatorError, match=named):
        run(None, server.url, resume=True, **options)
    run(None, server.url, resume=True, concurrency=3, retries=2, max_failures=1, timeout_s=9)


@pytest.mark.parametrize("what", ["answers.jsonl", "answers.jsonl.set_aside.jsonl"])
def test_a_file_that_is_none_of_ours_is_refused(run, server, what):
    run(chats(2), server.url)
    with (run.folder / what).open("a") as file:
        file.write('{"no": "key"}\n')
    with pytest.raises(SpeculatorError, match=rf"{what}, line \d: .*expected a record"):
        run(None, server.url, resume=True)
    (run.folder / "answers.jsonl.yaml").write_text("3")
    with pytest.raises(SpeculatorError, match="does not state the options"):
        run(None, server.url, resume=True)


def test_two_runs_do_not_write_one_file(run, server):
    seen = []

    def reply(body):
        with pytest.raises(SpeculatorError, match="another run is writing"):
            run(None, server.url, resume=True)
        seen.append(body)
        return echo(body)

    server.reply = reply
    run(chats(1), server.url)
    assert len(seen) == 1


def test_options_versions_and_progress_lie_beside_the_output(run, server):
    run(chats(2), server.url, max_tokens=5)
    stated = yaml.safe_load(run.output.with_name("answers.jsonl.yaml").read_text())
    assert stated["options"]["answers"]["sampling"]["max_tokens"] == 5
    assert stated["run"]["answers"]["endpoint"]["base_url"] == server.url
    assert "transformers" in stated["versions"]
    log = run.output.with_name("answers.jsonl.log").read_text()
    assert "began" in log and "ended: 2 conversations, 2 answers, 6 tokens" in log


def test_only_what_data_name_must_lie_in_the_allowed_folders(run, server, tmp_path):
    """Data and output lie where the user says."""
    data = tmp_path / "elsewhere"
    data.mkdir()
    (data / "train.jsonl").symlink_to(run.write(chats(1)))
    options = {"allowed_roots": [tmp_path / "nowhere"], "output": tmp_path / "there" / "out.jsonl"}
    run(None, server.url, **options)
    assert (tmp_path / "there" / "out.jsonl").exists()
    options |= {"data": {"path": str(data)}, "output": run.output}
    with pytest.raises(SpeculatorError, match="is outside.*Add its folder to --allowed-roots"):
        run(None, server.url, **options)
    assert len(server.bodies) == 1 and not run.output.exists()
    run(None, server.url, **options | {"allowed_roots": [tmp_path]})


@pytest.mark.parametrize(
    ("path", "complaint"),
    [("missing.jsonl", "missing.jsonl: no such file"), ("rows.jsonl", "--resume to append to it")],
)
def test_wrong_places_are_refused_before_anything_heavy_is_loaded(run, path, complaint, tmp_path):
    run.write(chats(1))
    run.output.write_text("{}\n")
    code = (
        "import sys\n"
        "from speculators_core.cli import main\n"
        f"try: main(['regenerate', '{tmp_path / path}', '--output', '{run.output}'])\n"
        "except SystemExit as leave: code = leave.code\n"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2 False False\n"
    assert complaint in done.stderr and done.stderr.count("\n") == 1


def test_flags_reach_the_run(run, server, capsys, monkeypatch):
    monkeypatch.chdir(run.folder)
    run.write([{"turns": json.dumps(chat("q", 2)["messages"])}] * 3)
    flags = "--columns.messages turns --limit 2 --temperature 0.5 --cut keep --max-failures 0"
    options = ["--template-options", '{"enable_thinking": false}', "--base-url", server.url]
    with pytest.raises(SystemExit, match="0"):
        main(["regenerate", "rows.jsonl", "--output", "answers.jsonl", *flags.split(), *options])
    assert len(run.lines()) == 2
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.bodies[0]["temperature"] == 0.5
    told = " ".join(capsys.readouterr().out.split())
    assert "wrote answers.jsonl: 2 conversations, 4 answers, 12 tokens" in told


# ---- token ids ----


def answer_of(prompt, written):
    return Answer("text", num_tokens=len(written), prompt_ids=prompt, token_ids=written)


@pytest.mark.parametrize(
    ("second", "rows"),
    {
        "the same history": (
            (1, 2, 8, 9, 3),
            [((1, 2, 8, 9, 3, 7), (0, 0, 1, 1, 0, 1))],
        ),
        "a history that the template has rewritten": (
            (1, 2, 8, 3),
            [((1, 2, 8, 9), (0, 0, 1, 1)), ((1, 2, 8, 3, 7), (0, 0, 0, 0, 1))],
        ),
    }.values(),
)
def test_turns_with_one_history_share_a_row_of_tokens(second, rows):
    dialogue = Dialogue("0/0", chat("q", turns=2)["messages"])
    dialogue.take(answer_of((1, 2), (8, 9)))
    dialogue.take(answer_of(second, (7,)))
    assert [(row.input_ids, row.loss_mask) for row in dialogue.token_rows] == rows


def test_a_server_without_token_ids_sets_conversations_aside(run, server):
    data, settings = run.settings(server.url)
    run.write(chats(1))
    answers = settings.answers.model_copy(update={"token_ids": True})
    report = regenerate(data, settings.model_copy(update={"answers": answers}))
    assert server.bodies[0]["return_token_ids"] is True
    assert run.aside() == {"0/0": "the engine reports no token ids"}
    assert report.num_in_output == 0
