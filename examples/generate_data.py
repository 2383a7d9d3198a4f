"""Texts through a verifier, to disk and on to training."""

import json
from pathlib import Path

from torch.utils.data import DataLoader

from benchmarks.playground import VERIFIER
from speculators_core import (
    DataGenConfig,
    DiskStore,
    GeneratedDataset,
    InferencePipeline,
    generate_data,
)

TEXTS = ["def add(a, b):\n    return a + b\n", "class Point:\n    x = 0\n"]
Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
config = DataGenConfig(verifier=str(VERIFIER), datasets=[{"path": "texts.jsonl"}])

# Whole: speculators generate-data does the same.
report = generate_data(config, path="states", batch_size=2, max_length=64)
print(report.num_examples, "examples of", report.num_tokens, "tokens")

# Piece by piece: an engine, and a store that takes what it gives.
with InferencePipeline.from_config(config, batch_size=2, max_length=64) as pipeline:
    sink = DiskStore.create(Path("own-states"), pipeline.schema)
    sink.write_batch(pipeline.forward(TEXTS))
    sink.close()

for batch in DataLoader(GeneratedDataset("own-states", row_length=64), batch_size=2):
    print(batch.input_ids.shape, batch.aux_hidden_states.shape)
