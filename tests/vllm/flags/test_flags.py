"""Under each of vLLM's flags, texts are those without a draft, or the engine is refused.

Every engine has a process that may die, and a limit of time. Log-probabilities of requests are
compared as lists of the most likely tokens.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks import playground
from speculators_core.decoding.prompts import read_prompts, tokenize
from tests.vllm.flags.flags import DECISIVE, FLAGS, REFUSED, Flag

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ALONE = "none"
NUM_PROMPTS, FIRST_LENGTH, STEP = 5, 60, 9
"""Prompts of different lengths: a batch's places are not those of one request."""
ENGINE = {
    "model": str(playground.VERIFIER),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 64,
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(playground.VERIFIER)
    found = tokenize(read_prompts(playground.PROMPTS), tokenizer, 2048)
    apart = found[:: len(found) // NUM_PROMPTS][:NUM_PROMPTS]
    return [prompt.token_ids[: FIRST_LENGTH + STEP * n] for n, prompt in enumerate(apart)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[int, str]:
    """Two LoRA adapters with which texts are others."""
    folders = {}
    for number in (1, 2):
        folder = tmp_path_factory.mktemp(f"adapter{number}")
        torch.manual_seed(number)
        targets = ("q_proj", "v_proj", "down_proj")
        tensors = {}
        for name, weight in load_file(playground.VERIFIER / "model.safetensors").items():
            stem = name.removesuffix(".weight")
            if stem.endswith(targets):
                outer, inner = weight.shape
                tensors[f"base_model.model.{stem}.lora_A.weight"] = torch.randn(4, inner) * 0.1
                tensors[f"base_model.model.{stem}.lora_B.weight"] = torch.randn(outer, 4) * 0.1
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": targets}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders[number] = str(folder)
    return folders


@pytest.fixture
def answers(tmp_path, prompts, adapters):
    """Runs engines, one after another in each of some processes."""

    def run(engines: Sequence[tuple[str, str]], num_processes: int = 1) -> dict[str, dict]:
        started = []
        for number in range(num_processes):
            own = engines[number::num_processes]
            jobs = {key(*one): job(*one, prompts, adapters) for one in own}
            started.append((_start(tmp_path / f"{number}", jobs), tmp_path / f"{number}.jsonl"))
        found = {}
        for process, file in started:
            assert process.wait() == 0, file.with_suffix(".log").read_text()[-3000:]
            for row in map(json.loads, file.read_text().splitlines()):
                found[row.pop("name")] = row
        return found

    return run


def key(flag: str, algorithm: str) -> str:
    return f"{flag} | {algorithm}"


def job(name: str, algorithm: str, prompts: Sequence[list[int]], adapters: dict[int, str]) -> dict:
    """What `serve` runs: an engine's arguments, and one request a prompt."""
    flag = FLAGS[name]
    arguments = ENGINE | flag.arguments
    speculative = arguments.pop("speculative_config", {})
    if algorithm != ALONE:
        draft = {"model": str(playground.SPECULATORS[algorithm])}
        arguments["speculative_config"] = draft | speculative
    return {
        "arguments": arguments,
        "requests": [request(flag, n, token_ids, adapters) for n, token_ids in enumerate(prompts)],
        "is_server": flag.is_server,
    }


def request(flag: Flag, number: int, token_ids: list[int], adapters: dict[int, str]) -> dict:
    asked: dict = {
        "token_ids": token_ids,
        "parameters": flag.parameters[number % len(flag.parameters)],
        "by_embeddings": flag.by_embeddings[number % len(flag.by_embeddings)],
    }
    adapter = flag.adapters[number % len(flag.adapters)]
    if adapter is not None:
        asked |= {"adapter": adapters[adapter], "adapter_id": adapter}
    return asked


def _start(stem: Path, jobs: dict[str, dict]) -> subprocess.Popen:
    job, result, log = (stem.with_suffix(suffix) for suffix in (".json", ".jsonl", ".log"))
    job.write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if k not in ("VLLM_PLUGINS", "LD_PRELOAD")}
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.vllm.flags.serve", str(job), str(result)],
            cwd=Path(__file__).parents[3],
            env=environment,
            stdout=output,
            stderr=output,
        )


def faults(found: dict[str, dict], engines: Iterable[tuple[str, str]]) -> list[str]:
    """Each engine that died, or gave other texts, or was refused and should not be, in a line."""
    lines = []
    for flag, algorithm in engines:
        answer, alone = found[key(flag, algorithm)], found.get(key(flag, ALONE), {})
        expected = REFUSED.get((flag, algorithm), REFUSED.get((flag, None)))
        if "dead" in answer and algorithm == ALONE:
            continue  # a fault without a draft too: with one it has to be refused
        if "dead" in answer:
            lines.append(f"{flag}, {algorithm}: died: {answer['dead'][-300:]}")
        elif "refused" in answer:
            is_alone_too = "refused" in alone
            if not is_alone_too and (expected is None or expected not in answer["refused"]):
                lines.append(f"{flag}, {algorithm}: refused: {answer['refused']}")
        elif expected is not None and algorithm != ALONE:
            lines.append(f"{flag}, {algorithm}: not refused")
        elif any(answer.get(what) != alone.get(what) for what in ("texts", "logprobs")):
            lines.append(f"{flag}, {algorithm}: other texts")
    return lines


def test_decisive_flags_give_the_same_texts(answers):
    engines = [(flag, algorithm) for flag in DECISIVE for algorithm in (ALONE, "eagle3")]
    found = answers(engines)
    assert faults(found, engines) == []
    for flag, algorithm in engines:
        answer, plain = found[key(flag, algorithm)], found[key(ALONE, ALONE)]
        assert (answer["texts"] != plain["texts"]) == flag.startswith(("LoRA", "thinking"))
        assert sum(map(sum, answer["accepted"])) > 20 or algorithm == ALONE
    some = found[key("LoRA of some requests", ALONE)]["texts"]
    assert some[1] == plain["texts"][1]  # the one without an adapter


@pytest.mark.flags
def test_every_flag_gives_the_same_texts_or_a_refusal(answers):
    engines = [
        (flag, algorithm) for flag in FLAGS for algorithm in (ALONE, *playground.SPECULATORS)
    ]
    assert faults(answers(engines, num_processes=2), engines) == []
