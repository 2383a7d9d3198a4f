"""The base of all models at its documented place."""

from speculators_core import SpeculatorModel, reload_and_populate_models

__all__ = ["SpeculatorModel", "reload_and_populate_models"]
