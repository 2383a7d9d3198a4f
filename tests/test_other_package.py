"""An algorithm that another package brings works like ours, from config to decoding."""

import copy
import sys

import pytest
import torch

from speculators_core.diagnosis.suspects import suspects
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import (
    SpeculatorModelConfig,
    reload_and_populate_models,
    reload_schemas,
)
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.registry import MODELS
from tests.conftest import SMALL_RECIPES, make_batch
from tests.data import OTHER_PACKAGE


@pytest.fixture
def installed(monkeypatch):
    """The package on the path, as pip would leave it."""
    monkeypatch.syspath_prepend(str(OTHER_PACKAGE))
    reload_and_populate_models()
    yield MODELS.load("bigram")
    monkeypatch.undo()
    sys.modules.pop("bigram_speculator", None)
    reload_schemas()


def test_it_is_unknown_until_it_is_looked_for(monkeypatch):
    with pytest.raises(SpeculatorError, match="unknown speculators_model_type 'bigram'"):
        SpeculatorModelConfig.from_dict({"speculators_model_type": "bigram"})
    monkeypatch.syspath_prepend(str(OTHER_PACKAGE))
    assert "bigram" not in MODELS.names()
    reload_schemas()
    assert "bigram" in MODELS.names()
    monkeypatch.undo()
    reload_schemas()
    assert MODELS.names() == sorted(SMALL_RECIPES)


def test_it_trains_decodes_and_comes_back_from_disk(installed, verifier, verifier_folder, tmp_path):
    model = installed.from_training_args(
        verifier.config, verifier=verifier, name_or_path=str(verifier_folder), rank=4
    )
    SpeculatorModel.verify_training_compatible(model)
    train_kwargs, _ = model.get_trainer_kwargs(loss={"ce": 1.0})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(10):
        _, loss, _ = model(make_batch(verifier), **train_kwargs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path, verifier=verifier)
    assert type(again) is installed and again.config.rank == 4
    ids = torch.tensor([[5, 6, 7], [9, 8, 7]])
    alone = verifier.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0)
    ours = again.generate(ids, max_new_tokens=20, pad_token_id=0)
    assert torch.equal(ours, alone)
    assert {suspect.cause for suspect in suspects(again, verifier)} == {"position shift"}
    with pytest.raises(SpeculatorError, match="from_training_args: unknown option depth"):
        installed.from_training_args(verifier.config, depth=2)


def test_its_config_declares_what_it_leaves_open(installed):
    config = installed.config_class()
    assert config.aux_layer_ids == config.stated_layer_ids == []
    assert config.norm_options == {} and config.vocabulary.is_whole
    assert config.verifier_hidden_size == config.transformer_layer_config.hidden_size
    assert list(config.other_readings(config.transformer_layer_config)) == []
    elsewhere = copy.deepcopy(config.transformer_layer_config)
    elsewhere.rope_parameters = {"rope_type": "default", "rope_theta": 7.0}
    (other,) = config.other_readings(elsewhere)
    assert other.cause == "rope"
    assert other.changes["transformer_layer_config"].rope_parameters == elsewhere.rope_parameters
