"""Document D: data generation."""

import json
import subprocess
import sys

import pytest
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from benchmarks.playground import VERIFIER
from speculators_core import (
    Batch,
    DataGenConfig,
    DiskStore,
    GeneratedDataset,
    InferencePipeline,
    SpeculatorError,
    generate_data,
)
from speculators_core.data_generation.settings import SyncConfig
from speculators_core.data_generation.stores.shards import SUFFIXES
from tests.documented.rows import proves

TEXTS = ["def f(x):\n    return x\n", "class A:\n    pass\n"]


def make_config(folder, **keys) -> DataGenConfig:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    keys = {"verifier": str(VERIFIER), "datasets": [{"path": str(rows)}], **keys}
    return DataGenConfig.model_validate(keys)


@proves(
    "verifier as a pretrained instance",
    "EngineConfig.device_map",
    "InferencePipeline.from_config(DataGenConfig, **engine_kwargs)",
    "InferencePipeline.forward(batch) -> list[ExampleDict]",
    "generate_data(config: DataGenConfig, **kwargs)",
    "GeneratedDataset in a DataLoader",
)
def documented_calls(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(VERIFIER)
    config = make_config(tmp_path, verifier=model)
    with InferencePipeline.from_config(config, batch_size=2, device_map="cpu") as pipeline:
        first, second = pipeline.forward(TEXTS)
        assert len(first["input_ids"]) == len(first["hidden_states"])
        sink = DiskStore.create(tmp_path / "own", pipeline.schema)
        sink.write_batch([first, second])
        sink.close()
    assert [e["key"] for e in DiskStore.open(tmp_path / "own").read()] == ["0", "1"]
    generate_data(config, path=tmp_path / "states", max_length=32)
    (batch,) = DataLoader(GeneratedDataset(tmp_path / "states", row_length=32), batch_size=2)
    assert isinstance(batch, Batch) and batch.input_ids.shape[0] == 1


@proves("--engine.vllm.<option> flags")
def flags_of_vllm():
    code = (
        "from speculators_core.cli import app\n"
        "_, bound, _ = app().parse_args(['generate-data', '--engine.vllm.max-num-seqs', '4'])\n"
        "print(bound.arguments['flags'].engine.vllm)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "{'max_num_seqs': 4}", done.stderr


@proves("ZeroMQ broker")
def no_broker(tmp_path):
    both = ["tcp://10.0.0.1:5555", "tcp://10.0.0.2:5555"]
    assert SyncConfig(kind="zmq", urls=both).urls == tuple(both)
    with pytest.raises(SpeculatorError, match="sync.kind"):
        generate_data(make_config(tmp_path), kind="broker")


@proves("training pipeline HASS", "research prototypes")
def other_algorithms():
    from speculators_core.models.eagle3 import Eagle3DraftModel
    from speculators_core.registry import MODELS

    assert set(MODELS.names()) >= {"eagle3", "peagle", "dflash", "mtp"}
    train, _ = Eagle3DraftModel.get_trainer_kwargs(ttt_steps=5)
    assert train["objective"].ttt_steps == 5


@proves("shards as msgpack/zstd, parquet or arrow")
def shards():
    assert set(SUFFIXES) == {"none", "zstd"}
    assert all(".safetensors" in suffix for suffix in SUFFIXES.values())


@proves("converters of external formats")
def no_converters():
    code = "from speculators_core.cli import main; main(['convert'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "convert" in done.stderr and "Traceback" not in done.stderr
