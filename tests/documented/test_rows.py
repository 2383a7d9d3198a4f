"""Every documented name does what its document says, or is declined with a reason."""

import importlib
import inspect
from pathlib import Path

import pytest

import speculators_core
from tests.documented.rows import MOST_DECLINED, PROOFS, Row, read_rows

ROWS = read_rows()
for file in sorted(Path(__file__).parent.glob("section_*.py")):
    importlib.import_module(f"{__package__}.{file.stem}")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section}: {row.name}")
def test_a_row_is_proved(row: Row, request):
    if row.state == "open":
        pytest.skip("not decided yet")
    proof = PROOFS[row.name]
    proof(**{name: request.getfixturevalue(name) for name in inspect.signature(proof).parameters})


PLACES = {
    "config": (
        "SpeculatorModelConfig SpeculatorsConfig VerifierConfig TokenProposalConfig "
        "SpeculativeConfig reload_schemas reload_and_populate_configs"
    ),
    "model": "SpeculatorModel reload_and_populate_models",
    "models": (
        "DFlashDraftModel DFlashSpeculatorConfig Eagle3DraftModel Eagle3SpeculatorConfig "
        "MTPDraftModel MTPSpeculatorConfig PEagleDraftModel PEagleSpeculatorConfig"
    ),
    "proposals": "GreedyTokenProposalConfig TokenProposalConfig",
    "inference": "SpeculativeInferenceEngine",
}
"""Modules of the documents, and what they are documented to have."""


@pytest.mark.parametrize("module", PLACES)
def test_names_are_where_the_documents_have_them(module):
    place = importlib.import_module(f"speculators_core.{module}")
    for name in PLACES[module].split():
        assert getattr(place, name) is getattr(speculators_core, name)
    with pytest.raises(AttributeError):
        _ = place.Nothing


def test_every_proof_has_its_row():
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert set(PROOFS) <= set(names)


def test_every_row_is_decided():
    undecided = {row.name for row in ROWS if row.state == "open"}
    assert undecided <= {"DeepSpeed", "pip extras [vllm, deepspeed]"}


def test_few_rows_are_declined():
    assert sum(row.state == "declined" for row in ROWS) <= MOST_DECLINED
