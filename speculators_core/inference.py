"""The inference engine, at the place that the documents have it."""

from speculators_core import SpeculativeConfig, SpeculativeInferenceEngine

__all__ = ["SpeculativeConfig", "SpeculativeInferenceEngine"]
