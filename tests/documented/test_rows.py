"""Every documented name does what its document says, or is declined with a reason."""

import importlib
import inspect
from pathlib import Path

import pytest

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


def test_every_proof_has_its_row():
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert set(PROOFS) <= set(names)


def test_few_rows_are_declined():
    assert sum(row.state == "declined" for row in ROWS) <= MOST_DECLINED
