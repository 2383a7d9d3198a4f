"""Proposal methods at their documented place."""

from speculators_core import (
    GreedyTokenProposalConfig,
    SamplingTokenProposalConfig,
    TokenProposalConfig,
)

__all__ = ["GreedyTokenProposalConfig", "SamplingTokenProposalConfig", "TokenProposalConfig"]
