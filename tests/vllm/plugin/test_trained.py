"""What `speculators train` ends with is served by vLLM as it was trained."""

import json

import pytest

from benchmarks import playground
from benchmarks.playground.corpus import write_chats
from speculators_core.data_generation.runs.generate import generate_data
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.train import train

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_a_run_is_checked_and_measured_at_its_end(tmp_path):
    write_chats(tmp_path / "chats.jsonl", count=24)
    data = {
        "verifier": str(playground.VERIFIER),
        "datasets": [{"path": str(tmp_path / "chats.jsonl")}],
        "states": {"layer_ids": [2, 16, 29]},
    }
    sync = {"path": str(tmp_path / "states"), "dtype": "float32"}
    roots = {"allowed_roots": [str(tmp_path)]}
    plan = {"data": data, "engine": {"max_length": 256}, "sync": sync, "run": roots}
    generate_data(GenerationPlan.read(plan, "test"))
    prompts = playground.PROMPTS.read_text().splitlines()[::6]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    sections = {
        "model": {"verifier": str(playground.VERIFIER), "start_from": str(playground.EAGLE3)},
        "data": {"store": str(tmp_path / "states"), "row_length": 512, "eval_examples": 2},
        "optimizer": {"learning_rate": 1e-6},
        "evaluation": {
            "prompts": str(tmp_path / "prompts.jsonl"),
            "num_prompts": 4,
            "max_tokens": 16,
            "every": 2,
        },
        "run": {"output": str(tmp_path / "run"), "max_steps": 2, "license": "apache-2.0"},
    }
    report = train(TrainingPlan.read(sections, "test"))
    assert report.verdict == "fit to serve"
    assert report.figures["acceptance_length"] > 1.5
    assert json.loads((tmp_path / "run" / "check.json").read_text())["served"]
    card = (report.speculator / "README.md").read_text()
    measured = json.loads((tmp_path / "run" / "acceptance" / "report.json").read_text())
    categories = measured["drafts"][0]["by_k"][0]["categories"]
    assert sum(counts["num_requests"] for counts in categories.values()) == 4
    for name, counts in categories.items():
        assert f"| {name} | {counts['acceptance_length']:.2f} |" in card
    assert "speculators acceptance --engine transformers" in card
