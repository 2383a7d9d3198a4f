"""The inference engine at its documented place."""

from speculators_core import SpeculativeConfig, SpeculativeInferenceEngine

__all__ = ["SpeculativeConfig", "SpeculativeInferenceEngine"]
