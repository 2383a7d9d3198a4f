"""A small verifier with prompts, and the plan of a build from them."""

import json
import random
from pathlib import Path

from speculators_core.building.settings import BuildPlan
from tests.conftest import VOCAB_SIZE, make_verifier
from tests.vllm.serving import write_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ 4 if m.role == 'user' else 5 }} {{ m.content }} "
    "{{ '</s>' if m.role != 'user' }} {% endfor %}{% if add_generation_prompt %}5 {% endif %}"
)
NUM_PROMPTS = 24


def write_given(folder: Path) -> Path:
    """A verifier and prompts of two categories."""
    make_verifier().save_pretrained(folder / "verifier")
    write_tokenizer(folder / "verifier", VOCAB_SIZE)
    write_template(folder, TEMPLATE)
    draw = random.Random(0)
    write_prompts(
        folder,
        [
            {
                "prompt": " ".join(str(draw.randrange(6, VOCAB_SIZE)) for _ in range(8)),
                "category": ("even", "odd")[number % 2],
            }
            for number in range(NUM_PROMPTS)
        ],
    )
    return folder


def write_template(folder: Path, text: str) -> None:
    (folder / "verifier" / "chat_template.jinja").write_text(text)


def write_prompts(folder: Path, rows: list[dict]) -> None:
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def plan_of(folder: Path, **changes: dict) -> BuildPlan:
    """A short build; ``changes`` are options by section."""
    sections: dict[str, dict] = {
        "model": {
            "verifier": str(folder / "verifier"),
            "recipe": {"aux_layer_ids": [1, 2, 3]},
            "objective": {"ttt_steps": 1},
        },
        "prompts": {"datasets": [{"path": str(folder / "prompts.jsonl")}], "max_length": 48},
        "answers": {"engine": "transformers", "sampling": {"max_tokens": 6}},
        "evaluation": {"decode": False, "roll_outs": 0},
        "run": {
            "output": str(folder / "build"),
            "check": False,
            "max_steps": 2,
            "eval_examples": 0,
        },
    }
    for name, options in changes.items():
        sections[name] = sections.get(name, {}) | options
    return BuildPlan.model_validate(sections)
