"""The rows of the documented API, and what proves each."""

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from speculators_core.settings import load_yaml
from tests.data import DOCUMENTED_API

MOST_DECLINED = 12


class Row(BaseModel):
    """A documented name, and what becomes of it here."""

    model_config = ConfigDict(extra="forbid")

    section: Literal["A", "B", "C", "D", "E", "F"]
    name: str
    state: Literal["done", "declined", "open"]
    note: str = ""
    instead: str = ""

    @model_validator(mode="after")
    def _a_declined_row_has_a_reason_and_a_way(self) -> "Row":
        if self.state == "declined" and not (self.note and self.instead):
            raise ValueError(f"{self.name} is declined without note and instead")
        return self


def read_rows() -> list[Row]:
    return [Row.model_validate(row) for row in load_yaml(DOCUMENTED_API.read_text())]


Proof = Callable[..., None]
PROOFS: dict[str, Proof] = {}
"""Row name to the function that proves it; its arguments are fixtures."""


def proves(*names: str) -> Callable[[Proof], Proof]:
    """Marks what runs the documented call of these rows, or shows how it is declined."""

    def mark(proof: Proof) -> Proof:
        for name in names:
            assert name not in PROOFS, name
            PROOFS[name] = proof
        return proof

    return mark
