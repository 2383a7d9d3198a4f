"""Config classes at their documented place."""

from speculators_core import (
    GreedyTokenProposalConfig,
    SpeculativeConfig,
    SpeculatorModelConfig,
    SpeculatorsConfig,
    TokenProposalConfig,
    VerifierConfig,
    reload_and_populate_configs,
    reload_schemas,
)

__all__ = [
    "GreedyTokenProposalConfig",
    "SpeculativeConfig",
    "SpeculatorModelConfig",
    "SpeculatorsConfig",
    "TokenProposalConfig",
    "VerifierConfig",
    "reload_and_populate_configs",
    "reload_schemas",
]
