"""Tokenizers that are absent, empty, or know more than their verifier: one line, first of all."""

import json
import shutil

import pytest
import yaml

from benchmarks import playground
from speculators_core.cli import main
from speculators_core.decoding.prompts import Prompt, tokenize
from speculators_core.errors import SpeculatorError
from speculators_core.verifier import reading
from speculators_core.verifier.reading import read_tokenizer

EAGLE3 = str(playground.SPECULATORS["eagle3"])
EMPTY = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}
MISSING = {
    "no file": ("tokenizer.json", "tokenizer_config.json"),
    "a config alone": ("tokenizer.json",),
    "no word": (),
}
ROWS = {
    "texts": {"text": "a b"},
    "conversations": {"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]},
}


@pytest.fixture(params=MISSING)
def folder(request, tmp_path):
    """A verifier of which one cannot have tokens."""
    folder = shutil.copytree(playground.VERIFIER, tmp_path / "verifier")
    for file in MISSING[request.param]:
        (folder / file).unlink()
    if request.param == "no word":
        (folder / "tokenizer.json").write_text(json.dumps(EMPTY))
    return folder


@pytest.mark.parametrize("command", ["acceptance", "generate-data", "train"])
@pytest.mark.parametrize("rows", ROWS)
def test_no_tokenizer_is_one_line_before_any_model_is_loaded(
    folder, tmp_path, monkeypatch, capsys, command, rows
):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        monkeypatch.setattr(getattr(reading, name), "from_pretrained", load)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROWS[rows])}\n")
    data = {"verifier": str(folder), "datasets": [{"path": str(tmp_path / "rows.jsonl")}]}
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump({"data": data}))
    new, texts = str(tmp_path / "new"), str(tmp_path / "texts.yaml")
    words = {
        "acceptance": [
            *("--engine", "transformers", "--model", EAGLE3, "--verifier", str(folder)),
            *("--output", new),
        ],
        "generate-data": ["--config", texts, "--sync.path", new],
        "train": [
            *("--model.verifier", str(folder), "--model.algorithm", "eagle3"),
            *("--data.texts", texts, "--run.output", new, "--run.max-steps", "1"),
            *("--evaluation.no-decode",),
        ],
    }
    with pytest.raises(SystemExit) as end:
        main([command, *words[command]])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert end.value.code == 2
    assert f"{folder}" in line and "tokenizer.json" in line


def test_a_prompt_with_a_token_that_the_verifier_lacks_is_named(tmp_path):
    folder = shutil.copytree(playground.VERIFIER, tmp_path / "verifier")
    tokenizer = read_tokenizer(folder)
    tokenizer.add_tokens(["<image>"])
    prompts = [Prompt(prompt="a"), Prompt(prompt="a <image> b")]
    assert len(tokenize(prompts, tokenizer, 100)) == 2
    message = r"prompt 2 has the token '<image>' \(2048\), expected those of .* 2048"
    with pytest.raises(SpeculatorError, match=message):
        tokenize(prompts, tokenizer, 100, vocab_size=2048)
