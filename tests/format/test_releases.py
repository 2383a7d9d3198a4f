"""Checkpoints that releases of the public package wrote: read, computed and written as they do."""

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from speculators_core.batch import Batch
from speculators_core.format.checkpoint import FOREIGN_KEYS
from speculators_core.models.dflash import DFlashDraftModel
from speculators_core.models.eagle3 import Eagle3DraftModel
from speculators_core.models.mtp import MTPDraftModel
from speculators_core.models.peagle import Elements, PEagleDraftModel
from speculators_core.models.speculator import SpeculatorModel
from tests.data import RELEASES

CHECKPOINTS = sorted(
    str(folder.relative_to(RELEASES)) for folder in RELEASES.glob("[0-9]*/*") if folder.is_dir()
)
LENGTH, STRIDE, STEPS, DEPTHS = 129, 16, 3, 4  # of tests/data/releases/write.py


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_file(RELEASES / "inputs.safetensors")


def load(name: str) -> SpeculatorModel:
    return SpeculatorModel.from_pretrained(
        RELEASES / name, verifier_attachment_mode="train_only", dtype=torch.float32
    ).eval()


def row_of(model: SpeculatorModel, inputs: dict[str, Tensor]) -> Batch:
    states = [inputs[f"state_{k}"] for k in model.aux_layer_ids]
    last = max(name for name in inputs if name.startswith("state_"))
    return Batch(
        input_ids=inputs["input_ids"][None],
        document_ids=torch.zeros(1, LENGTH, dtype=torch.long),
        position_ids=torch.arange(LENGTH)[None],
        loss_mask=torch.ones(1, LENGTH, dtype=torch.bool),
        aux_hidden_states=torch.cat(states, dim=-1)[None],
        last_hidden_states=inputs[last][None],
    )


def computed(
    model: SpeculatorModel, row: Batch, expected: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of our logits and the release's.

    Left out is what a window cuts off otherwise than in training: DFlash's whole context, and
    EAGLE-3's after the first step. There vLLM counts the window from each drafted token, and so do
    we; the releases count from the row.
    """
    window = getattr(model.config.transformer_layer_config, "sliding_window", None) or LENGTH
    if isinstance(model, DFlashDraftModel):
        block, anchors = model.config.block_size, expected["anchor"]
        whole = anchors + block <= window
        logits = linear(model.states(row, anchors[whole]), model.head_weight)
        yield logits, expected["logits_0"][whole]
    elif isinstance(model, PEagleDraftModel):
        pairs = [(a, d) for a in range(LENGTH - 1) for d in range(DEPTHS) if a + d < LENGTH - 1]
        anchors, depths = map(torch.tensor, zip(*pairs, strict=True))
        logits = model.lm_head(model.states(row, Elements(anchors, depths)))[0]
        recorded = zip(expected["anchor"].tolist(), expected["depth"].tolist(), strict=True)
        both = [(pairs.index(p), n) for n, p in enumerate(recorded) if p[0] >= 0]
        ours, theirs = map(list, zip(*both, strict=True))
        yield logits[ours], expected["logits_0"][theirs]
    elif isinstance(model, Eagle3DraftModel):
        for step, output in enumerate(model.unroll(row, STEPS)):
            rows = range(0, len(output[0]) if step == 0 else window - STEPS, STRIDE)
            yield model.lm_head(output)[0, rows], expected[f"logits_{step}"][: len(rows)]
    else:
        assert isinstance(model, MTPDraftModel)
        for step, output in enumerate(model.unroll(row, STEPS, "independent")):
            theirs = expected[f"logits_{step}"]
            yield linear(output[0, ::STRIDE], model.head_weight)[: len(theirs)], theirs


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_the_release(inputs, name):
    model, expected = load(name), load_file(RELEASES / f"{name}.expected.safetensors")
    with torch.no_grad():
        for ours, theirs in computed(model, row_of(model, inputs), expected):
            assert len(ours) and (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_is_read_is_written_back(tmp_path, name):
    folder = RELEASES / name
    model = SpeculatorModel.from_pretrained(folder, verifier_attachment_mode="detached")
    model.save_pretrained(tmp_path)
    stored, written = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert all(torch.equal(stored[key], tensor) for key, tensor in written.items())
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    assert before.keys() - after.keys() <= FOREIGN_KEYS
