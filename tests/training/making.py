"""A small verifier with data of its own, and plans to train on them."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from speculators_core.data_generation.runs.generate import generate_data
from speculators_core.data_generation.settings import read_plan
from speculators_core.training.rows.sources import Rows
from speculators_core.training.settings import TrainingPlan
from tests.conftest import VOCAB_SIZE, make_verifier
from tests.vllm.serving import write_tokenizer

NUM_EXAMPLES = 60
RECIPES: dict[str, dict] = {
    "eagle3": {},
    "peagle": {"mask_token_id": 2, "speculative_tokens": 4},
    "dflash": {"mask_token_id": 2, "block_size": 5, "num_layers": 2},
    "mtp": {},
}
OBJECTIVES: dict[str, dict] = {
    "eagle3": {"ttt_steps": 2},
    "peagle": {"num_depths": 3},
    "dflash": {"max_anchors": 8},
    "mtp": {"num_steps": 2},
}


def write_given(folder: Path) -> Path:
    """A verifier, texts, the plan that makes data of them (data.yaml), and the data (states)."""
    make_verifier().save_pretrained(folder / "verifier")
    write_tokenizer(folder / "verifier", VOCAB_SIZE)
    draw = random.Random(0)
    rows = []
    for _ in range(NUM_EXAMPLES):
        length = draw.randrange(8, 30)
        ids = [draw.randrange(4, VOCAB_SIZE) for _ in range(length)]
        rows.append({"input_ids": ids, "loss_mask": [0] * 3 + [1] * (length - 3)})
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sections = {
        "data": {
            "verifier": str(folder / "verifier"),
            "datasets": [{"path": str(folder / "rows.jsonl")}],
            "states": {"layer_ids": [1, 2, 3]},
        },
        "engine": {"max_length": 40, "dtype": "float32"},
        "sync": {"path": str(folder / "states"), "shard_tokens": 200, "dtype": "float32"},
        "run": {"allowed_roots": [str(folder)]},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(sections))
    generate_data(read_plan(folder / "data.yaml"))
    return folder


@pytest.fixture(scope="session")
def given(tmp_path_factory) -> Path:
    return write_given(tmp_path_factory.mktemp("training"))


def sections_of(given: Path, output: Path, algorithm: str = "eagle3", **changes: dict) -> dict:
    """A short run; ``changes`` are options by section."""
    decoding = {"num_prompts": 3, "max_tokens": 8}
    if changes.get("evaluation", {}).get("decode") is False:
        decoding = {}
    sections: dict[str, dict] = {
        "model": {
            "algorithm": algorithm,
            "verifier": str(given / "verifier"),
            "recipe": RECIPES[algorithm],
            "objective": OBJECTIVES[algorithm],
        },
        "data": {"store": str(given / "states"), "row_length": 64, "eval_examples": 6},
        "optimizer": {"learning_rate": 3e-3},
        "evaluation": {"every": 4, "roll_outs": 12, **decoding},
        "run": {"output": str(output), "max_steps": 8, "check": False, "log_every": 1},
    }
    return {name: options | changes.get(name, {}) for name, options in sections.items()}


def plan_of(given: Path, output: Path, algorithm: str = "eagle3", **changes: dict) -> TrainingPlan:
    return TrainingPlan.read(sections_of(given, output, algorithm, **changes), "test")


def weights_of(speculator: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(speculator / "model.safetensors")


def log_of(run: Path) -> list[dict]:
    """The log without what the clock decides."""
    lines = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    timed = ("runtime", "per_second")
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines]


class InMemory(Rows):
    """Rows that are given as batches."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, row):
        return {**vars(self.batches[row]), "row": torch.tensor([row])}

    def keys_of(self, row):
        return []
