"""Texts of data sets as examples."""

import json
import re
import tracemalloc
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset_builder
from hypothesis import given
from hypothesis import strategies as st

from speculators_core.data_generation.settings import DataGenConfig, DatasetConfig, GenerationPlan
from speculators_core.data_generation.texts.digests import Digests
from speculators_core.data_generation.texts.open_dataset import _open_hub
from speculators_core.data_generation.texts.sources import (
    Counts,
    count_rows,
    open_sources,
    read_examples,
    read_plan_examples,
)
from speculators_core.data_generation.texts.spans import TokenSequence
from speculators_core.errors import SpeculatorError
from speculators_core.files import Roots
from speculators_core.texts.row_files import read_rows
from tests.data_generation.texts.families import learned_texts, make_tokenizer

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "world"}
TEXTS = [{"text": f"It is sunny, {number}."} for number in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps its copies here."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


class Reader:
    """Reads rows, or data sets that lie there, and keeps what was counted."""

    def __init__(self, folder):
        self.folder = folder

    def config(self, rows=None, family="llama3", data=(), **dataset) -> DataGenConfig:
        if rows is not None:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (self.folder / "rows.jsonl").write_text(text)
            dataset = {"path": str(self.folder / "rows.jsonl")} | dataset
        make_tokenizer(family).save_pretrained(self.folder / "verifier")
        settings = {"verifier": str(self.folder / "verifier"), "datasets": [dataset]}
        return DataGenConfig.model_validate(settings | dict(data))

    def read(self, rows=None, family="llama3", max_length=512, data=(), roots=None, **dataset):
        self.tokenizer, self.counts = make_tokenizer(family), Counts()
        config = self.config(rows, family, data, **dataset)
        roots = roots or Roots((self.folder,))
        return list(read_examples(config, self.tokenizer, max_length, self.counts, roots))

    def learned(self, *args, **kwargs) -> list[list[str]]:
        return [learned_texts(self.tokenizer, e) for e in self.as_lists(*args, **kwargs)]

    def texts(self, *args, **kwargs) -> list[str]:
        return [self.tokenizer.decode(e.input_ids) for e in self.read(*args, **kwargs)]

    def as_lists(self, *args, **kwargs):
        examples = self.read(*args, **kwargs)
        return [TokenSequence(e.input_ids.tolist(), e.loss_mask.tolist()) for e in examples]


@pytest.fixture
def reader(tmp_path) -> Reader:
    return Reader(tmp_path)


# ---- what rows are ----


@pytest.mark.parametrize("text", ["9", "true", "null", "[1]", '{"a": 1}', '"quoted"'])
def test_texts_that_look_like_json_are_texts(reader, text):
    assert reader.texts([{"text": f"{text} and more"}, {"text": text}])[1].endswith(text)


def test_rows_may_take_other_shapes_late_in_a_file(reader):
    """Behind the part of which `datasets` learns what rows look like."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    rows = [{"messages": [USER, ANSWER], "n": n, "filling": "x" * 1000} for n in range(11_000)]
    rows.append({"messages": [USER, call, {"role": "tool", "content": "1"}, ANSWER], "tools": []})
    reader.read(rows, data={"deduplicate": False})
    assert reader.counts.rows == 11_001


LINES = {
    "a byte order mark": "\ufeff" + '{"text": "a"}\n{"text": "b"}\n',
    "empty lines": '\n{"text": "a"}\r\n \r\n\n{"text": "b"}',
    "line separators inside": '{"text": "a", "n": "\u2028\u2029\x85"}\n{"text": "b"}\n',
    "late objects": '{"text": "a"}\n{"text": "b", "n": {"of": [1]}}\n',
    "large numbers": '{"text": "a", "n": 1}\n{"text": "b", "n": 100000000000000000000000}\n',
}


@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("name", LINES)
def test_json_lines_are_read_as_prompts_are(reader, name, streaming):
    path = reader.folder / "rows.jsonl"
    path.write_bytes(LINES[name].encode())
    found = reader.texts(path=str(path), streaming=streaming)
    assert [text.removeprefix("<|begin_of_text|>") for text in found] == ["a", "b"]
    assert [row["text"] for _, row in read_rows(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "fault"),
    {
        "not an object": ("[1]", "found .1., expected one JSON object"),
        "nested deeply": ("[" * 100_000, "recursion"),
        "half a character": ('{"text": "\\ud800"}', "surrogates not allowed"),
    }.values(),
)
def test_a_line_that_is_no_row_is_named(reader, line, fault):
    (reader.folder / "rows.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(SpeculatorError, match=rf"rows.jsonl, line 2: .*{fault}.*Correct the line"):
        reader.read(path=str(reader.folder / "rows.jsonl"))


def test_a_changed_file_is_read_again(reader):
    assert len(reader.read([{"text": "a"}])) == 1
    assert len(reader.read([{"text": "a"}, {"text": "b"}])) == 2


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
TOOL_CALL = {"name": "weather", "arguments": {"city": "Paris"}}
CALLED = '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>'
ROWS = {
    "messages": ({"messages": [USER, ANSWER]}, ["world<|eot_id|>"]),
    "messages as JSON": ({"messages": json.dumps([USER, ANSWER])}, ["world<|eot_id|>"]),
    "nulls": (
        {"messages": [USER | {"name": None}, ANSWER | {"tool_calls": None}]},
        ["world<|eot_id|>"],
    ),
    "text in parts": (
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}]},
        ["a\nb<|eot_id|>"],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "world"}]},
        ["world<|eot_id|>"],
    ),
    "ShareGPT with tools": (
        {
            "conversation": [
                {"from": "human", "value": "hello"},
                {"from": "function_call", "value": json.dumps(TOOL_CALL)},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": "It is."},
            ]
        },
        [CALLED, "It is.<|eot_id|>"],
    ),
    "arguments as JSON": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
                    ],
                },
            ]
        },
        [CALLED],
    ),
    "a plain tool call": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": TOOL_CALL}]}]},
        [CALLED],
    ),
    "prompt and completion": ({"prompt": "hello", "completion": " world"}, [" world<|eot_id|>"]),
    "prompt and response": ({"prompt": "hello", "response": " world"}, [" world<|eot_id|>"]),
    "prompt and completion of messages": (
        {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "b"}]},
        ["b<|eot_id|>"],
    ),
    "a completion with its end": ({"prompt": "a", "completion": "b<|eot_id|>"}, ["b<|eot_id|>"]),
    "plain text": ({"text": "hello world"}, ["hello world"]),
    "token ids": ({"input_ids": [40, 41, 42], "loss_mask": [0, 1, 1]}, None),
    "token ids alone": ({"input_ids": [40, 41, 42]}, None),
}


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("token ids")])
def test_what_is_learned_of_a_row(name, reader):
    row, learned = ROWS[name]
    assert reader.learned([row]) == [learned]


def test_token_ids_pass_through_as_they_are(reader):
    (masked,) = reader.as_lists([ROWS["token ids"][0]])
    (unmasked,) = reader.as_lists([ROWS["token ids alone"][0]])
    assert masked.input_ids == unmasked.input_ids == [40, 41, 42]
    assert masked.loss_mask == [False, True, True] and unmasked.loss_mask == [True] * 3


def test_the_first_kind_that_columns_suffice_for_is_taken(reader):
    row = {}
    for name, kind in (
        ("plain text", "plain text"),
        ("prompt and completion", "prompts with completions"),
        ("messages", "conversations"),
        ("token ids", "token ids"),
    ):
        row |= ROWS[name][0]
        (source,) = open_sources(reader.config([row]), Roots((reader.folder,)))
        assert source.parts.kind == kind
        assert f"{kind} in {', '.join(source.parts.columns)}; its columns are" in source.describe()
        assert all(column in source.describe() for column in row)


@pytest.mark.parametrize(
    "columns, row",
    [
        ({"input_ids": "ids", "loss_mask": "train"}, {"ids": [40, 41], "train": [0, 1]}),
        ({"messages": "dialog"}, {"dialog": [USER, ANSWER]}),
        ({"prompt": "question", "completion": "answer"}, {"question": "a", "answer": "b"}),
        ({"text": "body"}, {"body": "hello world"}),
    ],
)
def test_columns_are_taken_by_the_names_that_they_are_given(columns, row, reader):
    others = ROWS["token ids"][0] | ROWS["messages"][0] | ROWS["plain text"][0]
    (source,) = open_sources(
        reader.config([row | others], columns=columns), Roots((reader.folder,))
    )
    assert list(source.parts.columns) == list(row)
    assert len(reader.read([row | others], columns=columns)) == 1


def test_tools_reach_the_template_as_a_list_or_as_json(reader):
    tool = {"type": "function", "function": {"name": "weather", "description": None}}
    sent = '{"type": "function", "function": {"name": "weather"}}'
    for column, value in (("tools", [tool]), ("tools", [sent]), ("uses", json.dumps([tool]))):
        row = {"messages": [USER, ANSWER], column: value}
        (text,) = reader.texts([row], family="qwen3", columns={"tools": column})
        assert sent in text
    (without,) = reader.texts([{"messages": [USER, ANSWER], "tools": None}], family="qwen3")
    assert "<tools>" not in without


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize(
    "prompt, completion", [("hello", " world"), ("What is", ": a\n b"), ("(a", ")b")]
)
def test_completions_keep_their_text_in_tokenizers_of_both_kinds(prompt, completion, kind, reader):
    tokenizer = make_tokenizer("mistral", kind)
    config, counts = reader.config([{"prompt": prompt, "completion": completion}]), Counts()
    (example,) = read_examples(config, tokenizer, 99, counts, Roots((reader.folder,)))
    assert tokenizer.decode(example.input_ids[1:]) == f"{prompt}{completion}</s>"
    given = example.input_ids[~example.loss_mask].tolist()
    assert given == tokenizer(prompt)["input_ids"]


def test_a_completion_is_tokenised_apart_from_its_prompt_as_a_server_does(reader):
    tokenizer = make_tokenizer("llama3")
    assert len(tokenizer.tokenize("hello world")) < len(tokenizer.tokenize("hello ") + ["world"])
    assert reader.learned([{"prompt": "hello ", "completion": "world"}]) == [["world<|eot_id|>"]]


# ---- what is left out ----


def test_rows_that_cannot_be_used_are_counted_by_reason_and_said_once_each(reader, caplog):
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": []},
        {"messages": [USER]},
        {"messages": []},
        {"messages": [ANSWER]},
    ]
    with caplog.at_level("WARNING"):
        examples = reader.read(rows)
    assert [example.key for example in examples] == ["0/0"]
    assert reader.counts.as_dict() == {
        "rows": 5,
        "examples": 1,
        "tokens": len(examples[0].input_ids),
        "trained_tokens": int(examples[0].loss_mask.sum()),
        "truncated": 0,
        "duplicates": 0,
        "skipped": {
            "not what its columns promise": 2,
            "no answer to learn": 1,
            "refused by the chat template": 1,
        },
    }
    assert re.findall(r"skipped row (\d)", caplog.text) == ["1", "2", "4"]


@pytest.mark.parametrize("num_rows", [3, 150])
def test_a_source_of_which_nothing_can_be_used_ends_the_run(num_rows, reader):
    rows = [{"messages": [{"role": "system", "content": "a"}, USER, ANSWER]}] * num_rows
    with pytest.raises(SpeculatorError) as error:
        reader.read(rows, family="gemma")
    message = str(error.value)
    assert reader.counts.rows == min(num_rows, 100)
    for part in ("rows.jsonl (train)", "its columns are messages", "There is no system role"):
        assert part in message
    assert f"first {min(num_rows, 100)} rows" in message and "\n" not in message


def test_a_source_goes_on_once_one_of_its_first_rows_was_good(reader):
    for place in (0, 99):
        rows = [{"text": ""}] * 300
        rows[place] = {"text": "hello"}
        assert len(reader.read(rows)) == 1 and reader.counts.rows == 300


def test_short_rows_alone_are_no_fault_of_a_source(reader):
    assert reader.read([{"text": "a"}] * 3, data={"min_trained_tokens": 9}) == []
    assert reader.counts.skipped == {"fewer tokens to learn than data.min_trained_tokens": 3}


def test_min_trained_tokens_is_the_least_that_is_kept(reader):
    rows = [{"input_ids": [40, 41, 42], "loss_mask": [0] * (3 - n) + [1] * n} for n in range(4)]
    for least in range(4):
        kept = reader.read(rows, data={"min_trained_tokens": least, "deduplicate": False})
        assert [int(example.loss_mask.sum()) for example in kept] == list(range(least, 4))


def test_long_rows_are_cut_on_the_right_and_counted(reader):
    rows = [{"input_ids": [40, 41, 42, 43][:n], "loss_mask": [0, 0, 1, 1][:n]} for n in (3, 4)]
    short, long = reader.read(rows, max_length=3, data={"deduplicate": False})
    assert short.input_ids.tolist() == long.input_ids.tolist() == [40, 41, 42]
    assert long.loss_mask.tolist() == [False, False, True]
    assert reader.counts.truncated == 1 and reader.counts.tokens == 6
    (kept,) = reader.read(rows[:1] + [rows[1] | {"loss_mask": [0, 0, 0, 1]}], max_length=3)
    assert kept.key == "0/0"
    assert reader.counts.skipped == {"nothing to learn before engine.max_length": 1}


def test_rows_of_the_same_tokens_come_once_over_all_data_sets(reader, tmp_path):
    rows = [{"text": "hello"}, {"text": "world"}, {"text": "hello"}]
    config = reader.config(rows)
    config = config.model_copy(update={"datasets": config.datasets * 2})
    for deduplicate, keys in ((True, "0/0 0/1"), (False, "0/0 0/1 0/2 1/0 1/1 1/2")):
        counts = Counts()
        data = config.model_copy(update={"deduplicate": deduplicate})
        examples = list(
            read_examples(data, make_tokenizer("llama3"), 99, counts, Roots((tmp_path,)))
        )
        assert [example.key for example in examples] == keys.split()
        assert counts.duplicates == (4 if deduplicate else 0) and counts.rows == 6


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=60))
def test_digests_are_a_set(rows):
    digests, seen = Digests(), set()
    for row in rows:
        assert digests.add(row) == (tuple(row) not in seen)
        seen.add(tuple(row))
    assert len(digests) == len(seen)


def test_digests_take_little_memory_and_grow():
    tracemalloc.start()
    digests = Digests()
    assert all(digests.add([number]) for number in range(20_000))
    size_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not any(digests.add([number]) for number in range(20_000))
    assert digests.add([20_000]) and size_bytes < 20_000 * 50


# ---- keys ----


def test_keys_name_data_set_row_and_further_sequences_and_are_the_same_again(reader):
    turns = [USER, ANSWER, USER | {"content": "a"}, ANSWER | {"content": "b"}]
    rows = [{"messages": turns}, {"messages": []}, {"messages": turns[2:]}]
    first = reader.read(rows, family="qwen3")
    again = reader.read(rows, family="qwen3")
    assert [example.key for example in first] == ["0/0", "0/0.1", "0/2"]
    for one, other in zip(first, again, strict=True):
        assert one.key == other.key and torch.equal(one.input_ids, other.input_ids)
        assert one.input_ids.dtype == torch.int64 and one.loss_mask.dtype == torch.bool


# ---- where the verifier goes on writing ----


def test_a_prompt_alone_is_a_row_where_the_verifier_goes_on(reader):
    goes_on = {"states": {"tokens": "all"}}
    tail = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    for row, end in (
        ({"prompt": "hello"}, "hello"),
        ({"prompt": [USER]}, tail),
        ({"messages": [USER, ANSWER, USER]}, tail),
    ):
        (text,) = reader.texts([row], data=goes_on)
        assert text.endswith(end)
    with pytest.raises(SpeculatorError, match="has the columns prompt; expected"):
        reader.read([{"prompt": "hello"}])
    with pytest.raises(SpeculatorError, match="no answer to learn"):
        reader.read([{"messages": [USER]}])
    with pytest.raises(SpeculatorError, match="holds conversations, but .* has no chat template"):
        bare = reader.config([{"messages": [USER, ANSWER]}])
        (reader.folder / "verifier" / "chat_template.jinja").unlink()
        read_plan_examples(plan_of(bare, reader.folder), Counts())


# ---- where rows come from ----


def plan_of(data: DataGenConfig, *roots) -> GenerationPlan:
    return GenerationPlan(
        data=data,
        engine={"max_length": 3},
        sync={"path": "unused"},
        run={"allowed_roots": roots},
    )


def write_rows(folder, kind):
    """The same ten rows in every format; where they lie."""
    rows, path = Dataset.from_list(TEXTS), folder / f"rows.{kind}"
    if kind in ("jsonl", "json"):
        rows.to_json(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "csv":
        rows.to_csv(path)
    elif kind == "txt":
        path.write_text("\n".join(row["text"] for row in TEXTS))
    elif kind == "arrow":
        rows.save_to_disk(folder / "saved")
        (folder / "saved" / "data-00000-of-00001.arrow").rename(path)
    elif kind == "saved":
        rows.save_to_disk(path)
    elif kind == "saved splits":
        DatasetDict(train=rows, test=rows.select([3])).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        rows.to_parquet(path / "train-00000.parquet")
        rows.select([3]).to_parquet(path / "test-00000.parquet")
    return path


FORMATS = ["jsonl", "json", "parquet", "csv", "txt", "arrow", "saved", "saved splits", "folder"]


@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_the_same_in_every_format(kind, streaming, reader, tmp_path):
    path = write_rows(tmp_path, kind)
    texts = reader.texts(path=str(path), streaming=streaming)
    assert texts == [f"<|begin_of_text|>{row['text']}" for row in TEXTS]
    limited = reader.texts(path=str(path), streaming=streaming, limit=3)
    assert limited == texts[:3] and reader.counts.rows == 3
    if streaming is None:
        part = reader.texts(path=str(path), split="train[20%:40%]")
        assert part == texts[2:4]
    if kind in ("saved splits", "folder"):
        assert reader.texts(path=str(path), split="test", streaming=streaming) == texts[3:4]


def test_a_saved_data_set_is_read_as_lists_whatever_format_it_had(reader, tmp_path):
    rows = Dataset.from_list([ROWS["token ids"][0]]).with_format("numpy")
    rows.save_to_disk(tmp_path / "saved")
    (example,) = reader.read(path=str(tmp_path / "saved"))
    assert example.input_ids.tolist() == [40, 41, 42]


def test_streamed_rows_leave_no_copy(reader, tmp_path):
    path = str(write_rows(tmp_path, "jsonl"))
    for streaming in (True, None):
        reader.read(path=path, streaming=streaming)
        assert any((tmp_path / "cache").rglob("*.arrow")) == (not streaming)


@pytest.mark.parametrize(
    "sample_by, texts",
    [
        ("line", ["a", "b", "c"]),
        ("paragraph", ["a\nb", "c"]),
        ("document", ["a\nb\n\nc"]),
    ],
)
def test_a_text_file_is_lines_paragraphs_or_one_document(sample_by, texts, reader, tmp_path):
    (tmp_path / "rows.txt").write_text("a\nb\n\nc")
    found = reader.texts(path=str(tmp_path / "rows.txt"), sample_by=sample_by)
    assert found == [f"<|begin_of_text|>{text}" for text in texts]


def test_a_folder_has_the_configurations_that_its_description_names(reader, tmp_path):
    folder = tmp_path / "folder"
    for number in range(2):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "rows.jsonl").write_text(json.dumps(TEXTS[number]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: a, data_files: 0/*}\n"
        "- {config_name: b, data_files: 1/*}\n---\n"
    )
    for name, number in (("a", 0), ("b", 1)):
        (text,) = reader.texts(path=str(folder), name=name)
        assert text.endswith(TEXTS[number]["text"])
    with pytest.raises(SpeculatorError, match="cannot be opened"):
        reader.read(path=str(folder))


def test_hub_data_sets_are_streamed_unless_a_part_is_asked_for(reader, tmp_path):
    """One that was loaded before stands for the hub, which cannot be reached from here."""
    builder = load_dataset_builder(str(write_rows(tmp_path, "folder").rename(tmp_path / "name")))
    builder.download_and_prepare()
    cached = tmp_path / "cache" / "some___name" / "default" / "0.0.0" / "1"
    cached.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(cached)
    sizes = {}
    for split, streaming in (("train", None), ("train[:2]", None), ("train", False)):
        data = reader.config(path="some/name", split=split, streaming=streaming)
        (source,) = open_sources(data, Roots(()))
        sizes[split, streaming] = source.num_rows
    assert sizes == {("train", None): None, ("train[:2]", None): 2, ("train", False): 10}
    assert len(reader.read(path="some/name", name="default")) == 10
    with pytest.raises(SpeculatorError, match="some/name .*cannot be opened"):
        reader.read(path="some/name", name="another")


def test_a_hub_data_set_has_no_data_from_elsewhere(tmp_path, monkeypatch):
    write_rows(tmp_path, "folder").rename(tmp_path / "name")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpeculatorError, match="name lists /.*expected only files of the data set"):
        _open_hub(DatasetConfig(path="name"))


def test_a_folder_has_no_data_from_elsewhere(reader, tmp_path):
    fsspec.filesystem("memory").pipe("/elsewhere/rows.jsonl", b'{"text": "hello"}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text(
        "---\nconfigs:\n- {config_name: a, data_files: 'memory://elsewhere/rows.jsonl'}\n---\n"
    )
    with pytest.raises(SpeculatorError, match="lists memory:.*expected only files of the data set"):
        reader.read(path=str(tmp_path / "folder"))


def test_reading_is_lazy(reader):
    rows = [{"text": f"hello {number}"} for number in range(5000)]
    counts, config = Counts(), reader.config(rows, streaming=True)
    examples = read_examples(config, make_tokenizer("llama3"), 99, counts, Roots((reader.folder,)))
    assert counts.rows == 0
    assert len(list(islice(examples, 7))) == counts.rows == 7


# ---- what is refused before anything is read ----


@pytest.mark.parametrize(
    "dataset, message",
    [
        ({"path": "missing.jsonl"}, "no such file or folder"),
        ({"path": "./missing"}, "no such file or folder"),
        ({"path": "no-such/data"}, "no-such/data .*cannot be opened"),
        ({"path": "rows.xyz"}, "expected one of .jsonl, .json"),
        ({"path": "rows.jsonl", "split": "test"}, "test"),
        ({"path": "rows.jsonl", "split": "test", "streaming": True}, "expected train"),
        ({"path": "rows.jsonl", "split": "train[:x]"}, "train"),
        ({"path": "rows.jsonl", "split": "train[:2]", "streaming": True}, "train"),
        ({"path": "rows.jsonl", "split": "train[:0]"}, "holds no rows"),
        ({"path": "none.csv", "streaming": True}, "none.csv.*holds no rows"),
        ({"path": "none.parquet", "streaming": True}, "none.parquet.*holds no rows"),
        ({"path": "rows.jsonl", "name": "main"}, "`name` is 'main', but a file has no conf"),
        ({"path": "rows.jsonl", "sample_by": "document"}, "sample_by"),
        (
            {"path": "rows.jsonl", "columns": {"text": "body"}},
            "no column 'body'.*one of text",
        ),
        ({"path": "saved", "split": "test"}, "test.*train"),
        ({"path": "other.jsonl"}, "has the columns a, b; expected 'input_ids', 'messages'"),
        ({"path": "broken.jsonl"}, "broken.jsonl, line 2: "),
        ({"path": "empty.jsonl"}, "empty.jsonl"),
        ({"path": "../missing.jsonl"}, "no such file or folder"),
        ({"path": "linked"}, "is outside"),
        ({"path": "described"}, "is outside"),
        ({"path": "saved elsewhere"}, "is outside"),
    ],
)
def test_bad_sources_are_one_line_before_anything_is_read(dataset, message, reader, monkeypatch):
    root = reader.folder / "root"
    root.mkdir()
    rows = Dataset.from_list(TEXTS)
    for place in (root, reader.folder / "beyond"):
        rows.save_to_disk(place / "saved")
        rows.to_json(place / "rows.jsonl")
    (reader.folder / "beyond" / "rows.jsonl").rename(reader.folder / "beyond.jsonl")
    (root / "rows.xyz").write_text("a")
    (root / "empty.jsonl").write_text("")
    (root / "none.csv").write_text("text\n")
    rows.select([]).to_parquet(root / "none.parquet")
    (root / "other.jsonl").write_text('{"a": 1, "b": 2}')
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text')
    (root / "link.jsonl").symlink_to(reader.folder / "beyond.jsonl")
    (root / "linked").mkdir()
    (root / "linked" / "train.jsonl").symlink_to(reader.folder / "beyond.jsonl")
    (root / "described").mkdir()
    (root / "described" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {reader.folder}/beyond.jsonl\n---\n"
    )
    rows.save_to_disk(root / "saved elsewhere")
    (arrow,) = (root / "saved elsewhere").glob("*.arrow")
    arrow.unlink()
    arrow.symlink_to(reader.folder / "beyond" / "saved" / arrow.name)
    monkeypatch.chdir(root)
    with pytest.raises(SpeculatorError, match=message) as error:
        reader.read(**dataset, roots=Roots((root,)))
    assert "\n" not in str(error.value) and reader.counts.rows == 0


def test_what_the_user_names_lies_anywhere(reader):
    """And what is in it may be linked to where the plan allows it."""
    folder = reader.folder / "elsewhere"
    Dataset.from_list(TEXTS).to_json(folder / "rows.jsonl")
    (reader.folder / "link.jsonl").symlink_to(folder / "rows.jsonl")
    (reader.folder / "linked").mkdir()
    (reader.folder / "linked" / "train.jsonl").symlink_to(folder / "rows.jsonl")
    for name in ("elsewhere", "elsewhere/rows.jsonl", "link.jsonl"):
        path = str(reader.folder / name)
        reader.read(path=path, roots=Roots(()))
        assert reader.counts.rows == len(TEXTS)
    path = str(reader.folder / "linked")
    with pytest.raises(SpeculatorError, match="outside the allowed folders"):
        reader.read(path=path, roots=Roots(()))
    assert reader.read(path=path, roots=Roots((folder,)))


def test_a_file_that_breaks_off_is_named_when_its_end_is_reached(reader, tmp_path):
    lines = [json.dumps(row) for row in TEXTS]
    (tmp_path / "broken.jsonl").write_text("\n".join([*lines, '{"text": "a']))
    with pytest.raises(SpeculatorError, match="broken.jsonl, line 11: "):
        reader.read(path=str(tmp_path / "broken.jsonl"), streaming=True)


# ---- plans ----


def test_a_plan_reads_with_its_own_tokenizer_length_and_roots(reader, tmp_path):
    plan = plan_of(reader.config(TEXTS), tmp_path)
    examples = list(read_plan_examples(plan, Counts()))
    assert {len(example.input_ids) for example in examples} == {3}
    (tmp_path / "linked").mkdir()
    Dataset.from_list(TEXTS).to_json(tmp_path / "beyond.jsonl")
    (tmp_path / "linked" / "train.jsonl").symlink_to(tmp_path / "beyond.jsonl")
    data = reader.config(path=str(tmp_path / "linked"))
    with pytest.raises(SpeculatorError, match="is outside.*run.allowed_roots"):
        read_plan_examples(plan_of(data, tmp_path / "other"), Counts())
    assert read_plan_examples(plan_of(data, tmp_path), Counts())


def test_rows_are_counted_where_their_number_is_known(reader, tmp_path):
    known = reader.config(TEXTS)
    limited, streamed = reader.config(TEXTS, limit=3), reader.config(TEXTS, streaming=True)
    numbers = [count_rows(plan_of(data, tmp_path)) for data in (known, limited, streamed)]
    assert numbers == [10, 3, None]
