"""A speculator from a config and tensors, without its folder."""

import torch

from benchmarks.playground import CHECKPOINTS
from speculators_core import SpeculatorModel, SpeculatorModelConfig

from_folder = SpeculatorModel.from_pretrained(CHECKPOINTS / "mtp")
config = SpeculatorModelConfig.from_pretrained(CHECKPOINTS / "mtp")
state_dict = from_folder.state_dict()

model = SpeculatorModel.from_pretrained(None, config=config, state_dict=state_dict)
assert all(torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items())
print(type(model).__name__, "with", len(state_dict), "tensors")
