"""A whole run for a verifier that cannot be decoded exactly, and whose config leaves much open."""

import json
import logging
import random

import pytest
import torch

from speculators_core.data_generation.runs.generate import generate_data
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.train import train
from tests.families.making import FAMILY, VOCAB_SIZE, make_verifier
from tests.vllm.serving import write_tokenizer


def write_states(model_type, tmp_path):
    """The folder of a verifier of a family, with states of its texts beside it."""
    folder = tmp_path / "verifier"
    make_verifier(model_type).save_pretrained(folder)
    write_tokenizer(folder, VOCAB_SIZE - 1)  # the last id has no token
    draw = random.Random(0)
    rows = [
        {"input_ids": [draw.randrange(4, VOCAB_SIZE - 1) for _ in range(20)]} for _ in range(20)
    ]
    lines = [json.dumps({**row, "loss_mask": [0, 0, 0] + [1] * 17}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = {
        "verifier": str(folder),
        "datasets": [{"path": str(tmp_path / "rows.jsonl")}],
        "states": {"layer_ids": [1, 2, 3]},
    }
    sync = {"path": str(tmp_path / "states"), "dtype": "float32"}
    engine = {"max_length": 40, "dtype": "float32"}
    run = {"allowed_roots": [str(tmp_path)]}
    sections = {"data": data, "engine": engine, "sync": sync, "run": run}
    generate_data(GenerationPlan.read(sections, "test"))
    return folder


def train_in(folder, verifier, **evaluation):
    sections = {
        "model": {
            "algorithm": "dflash",
            "verifier": str(verifier),
            "recipe": {"num-layers": 1, "block-size": 4},
            "objective": {"max_anchors": 8},
        },
        "data": {"store": folder / "states", "row_length": 64, "eval_examples": 2},
        "evaluation": {"roll_outs": 4, "num_prompts": 2, "max_tokens": 8, **evaluation},
        "run": {"output": folder / "run", "max_steps": 2, "check": False},
    }
    return train(TrainingPlan.read(sections, "test"))


@pytest.mark.parametrize("model_type", ["gpt2", pytest.param("bloom", marks=FAMILY)])
def test_acceptance_is_measured_for_families_without_rope_or_positions(model_type, tmp_path):
    report = train_in(tmp_path, write_states(model_type, tmp_path))
    assert report.figures["acceptance_length"] >= 1


def test_training_runs_without_decoding_and_the_card_names_what_was_chosen(tmp_path, caplog):
    verifier = write_states("jamba", tmp_path)
    with caplog.at_level(logging.INFO):
        report = train_in(tmp_path, verifier, patience=1)
    said = [record.getMessage() for record in caplog.records]
    (line,) = [text for text in said if "without evaluation.decode" in text]
    assert "acceptance length or patience, which goes by it" in line
    assert "state that rejected tokens cannot be taken out of" in line and "\n" not in line
    (chosen,) = [text for text in said if text.startswith("chosen for the draft")]
    card = (tmp_path / "run" / "speculator" / "README.md").read_text()
    for part in (
        "mask_token_id 95 (the embedding table",
        "the verifier states no rotary embedding",
    ):
        assert part in chosen and part in card
    assert "predicted_acceptance_length" in report.figures
    assert "acceptance_length" not in report.figures
    draft = SpeculatorModel.from_pretrained(report.speculator)
    with pytest.raises(SpeculatorError, match="cannot be taken out of"):
        draft.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
