"""Load a speculator, attach its verifier and generate."""

from transformers import AutoModel, AutoTokenizer

from benchmarks.playground import CHECKPOINTS
from speculators_core import SpeculatorModel

model = SpeculatorModel.from_pretrained(CHECKPOINTS / "eagle3")  # the class that its config names

verifier = AutoModel.from_pretrained(CHECKPOINTS / "verifier")
model.attach_verifier(verifier)

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "verifier")
input_ids = tokenizer("import os\n\n\ndef ", return_tensors="pt").input_ids
outputs = model.generate(input_ids, do_sample=False, max_length=40)
print(tokenizer.decode(outputs[0]))
