"""Records of the report of ``speculators check``."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, Field, computed_field

from speculators_core.decoding.acceptance import (
    AcceptanceCounts,
    Cell,
    reached_and_kept,
    worst_cell,
)
from speculators_core.errors import Cause

Severity = Literal["fault", "warning", "note"]
Part = Literal["checkpoint", "stock vLLM", "verifier", "tensors", "acceptance", "reading"]


class Finding(BaseModel):
    """One observation about a speculator."""

    severity: Severity
    part: Part
    text: str
    cause: Cause | None = None
    """Cause of a fault; None for warnings and notes."""


class Counts(BaseModel):
    """Tokens that one side accepted."""

    num_drafts: int
    accepted_per_position: list[int]
    acceptance_length: float
    contexts: dict[str, "Counts"] = {}
    """The same by the number of tokens before the draft, in the ranges of `CONTEXT_BUCKETS` with
    drafts."""

    @classmethod
    def of(
        cls, counts: AcceptanceCounts, contexts: Mapping[str, AcceptanceCounts] | None = None
    ) -> Self:
        return cls(
            num_drafts=counts.num_drafts,
            accepted_per_position=counts.accepted_per_position,
            acceptance_length=counts.acceptance_length,
            contexts={name: cls.of(part) for name, part in (contexts or {}).items()},
        )

    @property
    def reached_and_kept(self) -> list[tuple[int, int]]:
        """For each position, the drafts that reached it and those kept there."""
        return reached_and_kept(self.num_drafts, self.accepted_per_position)

    @property
    def worst_cell(self) -> Cell | None:
        """The range of contexts and position with the lowest conditional rate."""
        return worst_cell({name: part.reached_and_kept for name, part in self.contexts.items()})


class CheckReport(BaseModel):
    """All findings about a speculator, and the verdict that follows from them."""

    speculator: str
    verifier: str | None = None
    speculative_tokens: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    findings: list[Finding] = Field(default_factory=list)
    stages: list[tuple[str, float | None]] = Field(default_factory=list)
    """Compared tensors with their largest difference over their largest value; None where only
    one side has numbers."""
    reference: Counts | None = None
    """Counts of the reference decoder."""
    served: Counts | None = None
    """Counts of vLLM."""
    verifier_difference: float | None = None
    """Largest difference of a token's log-probability where Transformers and vLLM compute
    the verifier alone differently; None where they do not."""

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "fault"]

    @property
    def is_fit(self) -> bool:
        return not self.faults

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def verdict(self) -> str:
        """``fit to serve``, or ``not fit to serve:`` and every cause once."""
        if self.is_fit:
            return "fit to serve"
        return f"not fit to serve: {', '.join(dict.fromkeys(f.cause or '' for f in self.faults))}"

    def add(self, severity: Severity, part: Part, text: str, cause: Cause | None = None) -> None:
        self.findings.append(Finding(severity=severity, part=part, text=text, cause=cause))
