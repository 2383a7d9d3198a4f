"""What processes of the tests of whole runs do."""

import json
import time

import datasets  # noqa: F401  # what a run imports when it needs it, imported ahead

from speculators_core.data_generation.engines.transformers import TransformersPipeline
from speculators_core.data_generation.examples import Schema
from speculators_core.data_generation.queues.mp_queue import MPQueueStore
from speculators_core.data_generation.queues.zmq_store import ZmqStore
from speculators_core.data_generation.runs.generate import generate_data
from speculators_core.data_generation.runs.workers import run_here  # noqa: F401
from speculators_core.data_generation.settings import GenerationPlan, SyncConfig


def run_slowly(plan):
    steps = TransformersPipeline.steps

    def slow(self, examples):
        time.sleep(0.08)
        return steps(self, examples)

    TransformersPipeline.steps = slow
    generate_data(GenerationPlan.model_validate_json(plan))


def consume(kind, schema, folder, name):
    """Notes each example when it has been dealt with, in a process of its own."""
    schema = Schema.model_validate_json(schema)
    sync = SyncConfig(kind=kind, queue_size=4, heartbeat_s=0.4)
    if kind == "zmq":
        source = ZmqStore.source(schema, sync, "tcp://127.0.0.1:*")
    else:
        source = MPQueueStore.source(schema, sync)
    (folder / f"{name}.part").write_text(source.url)
    (folder / f"{name}.part").rename(folder / f"{name}.url")
    with (folder / f"{name}.jsonl").open("w") as file:
        for example in source.read():
            ids, states = example.input_ids.tolist(), example.hidden_states
            told = {"key": example.key, "ids": ids, "sum": float(states.double().sum())}
            print(json.dumps(told), file=file, flush=True)
    source.close()
