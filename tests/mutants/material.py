"""A small verifier, drafts, data and plans, and every command that reads them."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.conftest import AUX_LAYER_IDS, make_draft, make_verifier
from tests.training.making import OBJECTIVES, write_given

DRAFTS = ("eagle3", "peagle", "dflash", "mtp")
PROMPTS = [
    {"category": "a", "prompt": "5 6 7 8"},
    {"category": "b", "messages": [{"role": "user", "content": "9 10"}]},
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{number} 8"},
            {"role": "assistant", "content": "9 10 11"},
        ],
        "chat_template_kwargs": {"thinking": True},
    }
    for number in range(5, 11)
]


def write_material(folder: Path) -> Path:
    """Everything that a command reads, below ``folder``."""
    write_given(folder)
    verifier, tiny = folder / "verifier", make_verifier()
    for name in DRAFTS:
        draft = make_draft(name, tiny, name_or_path=str(verifier))
        draft.save_pretrained(folder / name)
    _write_rows(folder / "prompts.jsonl", PROMPTS)
    _write_rows(folder / "chats.jsonl", CHATS)
    data = yaml.safe_load((folder / "data.yaml").read_text())
    texts = {**data, "data": {**data["data"], "datasets": [{"path": str(folder / "chats.jsonl")}]}}
    del texts["sync"]
    (folder / "texts.yaml").write_text(yaml.safe_dump(texts))
    plan = {
        "model": {
            "algorithm": "eagle3",
            "verifier": str(verifier),
            "recipe": {"aux_layer_ids": list(AUX_LAYER_IDS)},
            "objective": OBJECTIVES["eagle3"],
        },
        "data": {"store": str(folder / "states"), "row_length": 64, "eval_examples": 4},
        "optimizer": {"learning_rate": 3e-3},
        "evaluation": {
            "every": 1,
            "roll_outs": 4,
            "num_prompts": 2,
            "max_tokens": 4,
            "prompts": str(folder / "prompts.jsonl"),
        },
        "run": {"max_steps": 1, "check": False, "log_every": 1},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(plan))
    return folder


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


COMMANDS = {
    "check": "check",
    "certify": "certify",
    "acceptance": "acceptance",
    "push": "push",
    "inspect": "inspect",
    "verify": "inspect",
    "train": "train",
    "dry run": "train",
    "train from": "train",
    "train texts": "train",
    "generate-data": "generate-data",
    "generate chats": "generate-data",
    "regenerate": "regenerate",
}
"""Ways to run the commands of the command line."""


@dataclass(frozen=True)
class Place:
    """Where a case runs."""

    given: Path
    new: Path
    """An empty folder for what the command writes."""
    server: str
    """Address of a server that answers conversations."""


def command_line(command: str, draft: str, place: Place) -> list[str]:
    """The arguments of a command that succeeds on the material as it is."""
    given, new = place.given, str(place.new / "out")
    prompts = ["--prompts", str(given / "prompts.jsonl")]
    train = ["train", "--config", str(given / "train.yaml"), "--run.output", new]
    lines = {
        "check": ["check", str(given / draft), "--max-tokens", "8", "--verbose", *prompts],
        "certify": [
            *("certify", str(given / draft), "--max-tokens", "8", "--draws", "50"),
            *("--verbose", *prompts),
        ],
        "acceptance": [
            *("acceptance", "--engine", "transformers", "--model", str(given / draft)),
            *("--max-tokens", "4", "--output", new, *prompts),
        ],
        "push": [
            *("push", str(given / draft), "someone/draft", "--dry-run"),
            *("--license", "mit", "--verifier", "someone/verifier"),
        ],
        "inspect": ["inspect", str(given / "states")],
        "verify": ["inspect", str(given / "states"), "--verify"],
        "train": train,
        "dry run": [*train, "--dry-run"],
        "train from": [
            *("train", "--model.verifier", str(given / "verifier")),
            *("--model.start-from", str(given / draft), "--data.store", str(given / "states")),
            *("--data.row-length", "64", "--run.max-steps", "1", "--run.output", new),
            *("--evaluation.no-decode", "--evaluation.roll-outs", "0", "--run.no-check"),
        ],
        "train texts": [
            *("train", "--model.verifier", str(given / "verifier"), "--model.algorithm", "eagle3"),
            *("--model.recipe.aux-layer-ids", "[1,2,3]", "--data.texts", str(given / "texts.yaml")),
            *("--data.row-length", "64", "--run.max-steps", "1", "--run.output", new),
            *("--evaluation.no-decode", "--evaluation.roll-outs", "0", "--run.no-check"),
        ],
        "generate-data": [
            *("generate-data", "--config", str(given / "data.yaml"), "--sync.path", new),
        ],
        "generate chats": [
            *("generate-data", "--config", str(given / "texts.yaml"), "--sync.path", new),
        ],
        "regenerate": [
            *("regenerate", str(given / "chats.jsonl"), "--output", f"{new}.jsonl"),
            *("--base-url", place.server, "--allowed-roots", str(given)),
        ],
    }
    return lines[command]
