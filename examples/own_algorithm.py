"""An algorithm with its own arguments, registered in this process.

A package has an entry point instead: docs/how-to/add-an-algorithm.md.
"""

from typing import Literal

from benchmarks.playground import VERIFIER
from speculators_core import (
    Eagle3DraftModel,
    Eagle3SpeculatorConfig,
    SpeculatorModel,
    SpeculatorModelConfig,
)
from speculators_core.verifier.reading import read_verifier_config


@SpeculatorModelConfig.register("deep_eagle3")
class DeepEagle3Config(Eagle3SpeculatorConfig):
    """EAGLE-3 under another name."""

    speculators_model_type: Literal["deep_eagle3"] = "deep_eagle3"


@SpeculatorModel.register("deep_eagle3")
class DeepEagle3Model(Eagle3DraftModel):
    """EAGLE-3 that is evaluated over more steps than it is trained on."""

    config_class = DeepEagle3Config

    @classmethod
    def from_training_args(cls, verifier_config, t2d=None, d2t=None, **kwargs):
        fresh = Eagle3DraftModel.from_training_args(verifier_config, t2d, d2t, **kwargs)
        content = fresh.config.to_dict() | {"speculators_model_type": "deep_eagle3"}
        content["speculators_config"]["algorithm"] = "deep_eagle3"
        model = cls(DeepEagle3Config.from_dict(content))
        model.load_state_dict(fresh.state_dict())
        return model

    @classmethod
    def get_trainer_kwargs(cls, *, num_steps=3, **kwargs):
        train_kwargs, _ = super().get_trainer_kwargs(ttt_steps=num_steps, **kwargs)
        val_kwargs, _ = super().get_trainer_kwargs(ttt_steps=num_steps + 2, **kwargs)
        return train_kwargs, val_kwargs


model = DeepEagle3Model.from_training_args(read_verifier_config(VERIFIER), num_layers=2)
train_kwargs, val_kwargs = model.get_trainer_kwargs(num_steps=2)
print(type(model).__name__, train_kwargs["objective"].ttt_steps, val_kwargs["objective"].ttt_steps)
assert SpeculatorModel.registered_model_class_from_config(model.config) is DeepEagle3Model
