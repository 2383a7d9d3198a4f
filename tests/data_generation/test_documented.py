"""Data generation as its public document writes it."""

import json

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from benchmarks import playground
from speculators_core import (
    Batch,
    DataGenConfig,
    DiskStore,
    GeneratedDataset,
    GenerationPlan,
    InferencePipeline,
    SpeculatorError,
    generate_data,
    generate_data_process,
)
from speculators_core.data_generation.dataset import join_rows
from speculators_core.data_generation.engines.pipeline import schema_of
from speculators_core.data_generation.engines.transformers import TransformersPipeline
from speculators_core.data_generation.examples import Failure
from speculators_vllm.generation.engine import VLLMPipeline
from tests.conftest import make_verifier
from tests.data_generation.making import generated, schema

VERIFIER = playground.CHECKPOINTS / "verifier"
TEXTS = [f"def f{i}(self, x):\n    return {i}\n\n\nclass A:\n    pass\n" for i in range(4)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x = 1\n"}]


@pytest.fixture
def config(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataGenConfig(verifier=str(VERIFIER), datasets=[{"path": str(rows)}])


def test_a_pipeline_of_a_config_gives_an_example_for_each_item(config):
    items = [TEXTS[0], {"messages": CHAT}, CHAT, {"input_ids": [5, 6, 7]}]
    with InferencePipeline.from_config(config, batch_size=2, max_length=20) as pipeline:
        made = pipeline.forward(items)
        assert pipeline.plan.engine.batch_size == 2
        with pytest.raises(SpeculatorError, match="item 1: no answer to learn"):
            pipeline.forward([TEXTS[0], CHAT[:1]])
        pipeline.run = lambda examples: [Failure(one.key, "no memory") for one in examples]
        with pytest.raises(SpeculatorError, match="item 0: no memory"):
            pipeline.forward(items)
    assert len(made) == 4 and torch.equal(made[1].input_ids, made[2].input_ids)
    example = dict(made[0])
    assert example["hidden_states"].shape == (18, 4, pipeline.schema.hidden_size)
    assert torch.equal(example["prompt"], example["input_ids"]) and not len(
        example["output_tokens"]
    )
    assert example["logits"] is None and made[3]["input_ids"].tolist() == [5, 6, 7]
    with pytest.raises(KeyError, match="an example has key, prompt"):
        made[0]["states"]


def test_a_pipeline_continues_a_prompt(config):
    config = config.model_validate(config.model_dump() | {"states": {"tokens": "all"}})
    with InferencePipeline.from_config(config, max_length=64, max_new_tokens=8) as pipeline:
        (made,) = pipeline.forward(["import os\n"])
    assert len(made["output_tokens"]) == 7 and made["prompt"].tolist() != []


def test_options_stand_beside_a_config(config, tmp_path):
    report = generate_data(
        config,
        path=tmp_path / "a",
        max_length=16,
        num_workers=1,
        limit=3,
        sync={"dtype": "float32"},
    )
    assert report.num_examples == 3
    store = DiskStore.open(tmp_path / "a")
    assert store.schema.dtype == "float32" and max(store.lengths) <= 16
    with generate_data_process(config, path=tmp_path / "b", engine_kwargs={"max_length": 9}) as run:
        assert run.report().num_examples == 4


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_lenth": 3}, "unknown option 'max_lenth'. Did you mean 'max_length'"),
        ({"engine": 3}, "engine: expected a mapping of options, found 3"),
        ({"path": "x", "batch_size": 0}, "engine.batch_size"),
        ({}, "sync.path is missing"),
    ],
)
def test_wrong_options_are_refused(config, options, complaint):
    with pytest.raises(SpeculatorError, match=complaint):
        generate_data(config, **options)


def test_a_plan_has_its_options_already(config):
    plan = GenerationPlan.model_validate({"data": config, "sync": {"path": "x"}})
    with pytest.raises(SpeculatorError, match="limit beside a GenerationPlan"):
        generate_data(plan, limit=3)
    with pytest.raises(SpeculatorError, match="unknown option 'limit'"):
        InferencePipeline.from_config(config, limit=3)


def test_a_loaded_model_runs_as_it_is(config, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(VERIFIER)
    with torch.no_grad():
        model.model.norm.weight.mul_(0)  # no state changes, all logits are 0
    content = config.model_dump() | {"states": {"logits": "full"}}
    given = DataGenConfig.model_validate(content | {"verifier": model})
    assert given.verifier == str(VERIFIER)
    generate_data(given, path=tmp_path / "own", limit=2)
    generate_data(DataGenConfig.model_validate(content), path=tmp_path / "read", limit=2)
    own, read = (next(DiskStore.open(tmp_path / name).read()) for name in ("own", "read"))
    assert torch.equal(own.hidden_states, read.hidden_states)
    assert not own.logits.any() and read.logits.any()
    with pytest.raises(SpeculatorError, match="data.verifier is a loaded model"):
        generate_data(given, path=tmp_path / "several", workers=2)
    plan = GenerationPlan.model_validate(
        {"data": given, "engine": {"name": "vllm"}, "sync": {"path": "x"}}
    )
    with pytest.raises(SpeculatorError, match="is a loaded model.*engine vllm"):
        VLLMPipeline(plan, schema_of(plan))
    with pytest.raises(ValueError, match="was not loaded from a folder"):
        DataGenConfig(verifier=make_verifier(), datasets=[{"path": "x"}])


def test_a_device_map_places_the_verifier(config, monkeypatch):
    loaded = []
    real = AutoModelForCausalLM.from_pretrained.__func__

    def noted(cls, *names, **options):
        loaded.append(options["device_map"])
        return real(cls, *names, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(noted))
    with InferencePipeline.from_config(config, device_map={"": "cpu"}) as spread:
        (found,) = spread.forward(TEXTS[:1])
    assert loaded == [{"": "cpu"}]
    with InferencePipeline.from_config(config) as plain:
        (expected,) = plain.forward(TEXTS[:1])
    assert isinstance(plain, TransformersPipeline)
    assert torch.equal(found.hidden_states, expected.hidden_states)
    for wrong, complaint in (
        ({"device": "cpu"}, "engine.device_map places the verifier"),
        ({"name": "vllm"}, "device_map is for engine transformers"),
    ):
        with pytest.raises(SpeculatorError, match=complaint):
            InferencePipeline.from_config(config, device_map="auto", **wrong)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(None, 0), (1, 0), (2, 0), (2, 1)])
def test_a_loader_takes_any_batch_size(tmp_path, batch_size, num_workers):
    store = DiskStore.create(tmp_path / "s", schema())
    store.write_batch([generated(number, 20, store.schema) for number in range(4)])
    store.close()
    dataset = GeneratedDataset(tmp_path / "s", row_length=32)
    options = {"multiprocessing_context": "spawn"} if num_workers else {}
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, **options)
    rows, batches = batch_size or 1, list(loader)
    assert [type(batch) for batch in batches] == [Batch] * (4 // rows)
    assert batches[0].input_ids.shape == (1, 32 * rows)


def test_rows_end_to_end_keep_their_documents_apart():
    def row(documents):
        ids = torch.tensor([documents])
        states = torch.zeros(1, len(documents), 2)
        return Batch(ids, ids, ids, ids >= 0, states, states)

    joined = join_rows([row([0, 0, 1, -1]), row([-1, -1]), row([0, 1, 1, -1])])
    assert joined.document_ids.tolist() == [[0, 0, 1, -1, -1, -1, 2, 3, 3, -1]]
    assert joined.aux_hidden_states.shape == (1, 10, 2)
