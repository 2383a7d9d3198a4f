"""The base of all models, at the place that the documents have it."""

from speculators_core import SpeculatorModel, reload_and_populate_models

__all__ = ["SpeculatorModel", "reload_and_populate_models"]
