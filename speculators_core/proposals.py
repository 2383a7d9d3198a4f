"""Proposal methods, at the place that the documents have them."""

from speculators_core import (
    GreedyTokenProposalConfig,
    SamplingTokenProposalConfig,
    TokenProposalConfig,
)

__all__ = ["GreedyTokenProposalConfig", "SamplingTokenProposalConfig", "TokenProposalConfig"]
