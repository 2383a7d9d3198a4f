"""A sound draft has no likely cause; one read in another way than it was trained has one."""

import copy
import re

import pytest
import torch

from benchmarks import playground
from speculators_core.decoding.prompts import read_prompts, tokenize
from speculators_core.diagnosis import suspects as diagnosis
from speculators_core.diagnosis.replay import see
from speculators_core.diagnosis.suspects import diagnose, suspects
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.verifier.reading import load_verifier, read_tokenizer
from tests.conftest import DRAFTS, make_draft


@pytest.fixture(scope="module")
def playground_verifier():
    return load_verifier(str(playground.VERIFIER), torch.float32)


@pytest.fixture(scope="module")
def texts(playground_verifier):
    tokenizer = read_tokenizer(playground.VERIFIER)
    prompts = tokenize(read_prompts(playground.PROMPTS, 2), tokenizer, 512)
    seen = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        output = playground_verifier.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answer = output[0, len(prompt.token_ids) :].tolist()
        seen.append(see(playground_verifier, prompt.token_ids, answer))
    return seen


def load(name, verifier, **changes):
    """The playground's draft under other keys of its config."""
    whole = SpeculatorModel.from_pretrained(
        playground.SPECULATORS[name], verifier=verifier, dtype=torch.float32
    )
    config = copy.deepcopy(whole.config)
    for key, value in changes.items():
        owner = config if hasattr(config, key) else config.transformer_layer_config
        setattr(owner, key, value)
    model = type(whole)(config).to(torch.float32)
    model.load_state_dict(whole.state_dict(), strict=False)
    model.unset = set()
    model.attach_verifier(verifier, "full")
    return model.eval()


def test_a_draft_that_has_learnt_nothing_has_no_likely_cause(
    playground_verifier, texts, monkeypatch
):
    monkeypatch.setattr(diagnosis, "MIN_GAIN_NATS", 0.0)
    monkeypatch.setattr(diagnosis, "MIN_T", 0.0)
    config = SpeculatorModel.from_pretrained(playground.EAGLE3).config
    torch.manual_seed(0)
    fresh = DRAFTS["eagle3"](config).float()
    fresh.start_fresh(None, None)
    fresh.attach_verifier(playground_verifier, "full")
    found = diagnose(fresh.eval(), playground_verifier, texts, 3)
    assert any(trial.is_better for trial in found.trials) and found.acceptance_length < 1.05
    assert found.likely_cause is found.acceptance_length_if_fixed is None


@pytest.mark.parametrize("name", playground.SPECULATORS)
def test_a_sound_draft_has_no_likely_cause(name, playground_verifier, texts):
    found = diagnose(load(name, playground_verifier), playground_verifier, texts, 3)
    assert found.likely_cause is None and found.acceptance_length_if_fixed is None
    assert found.acceptance_length > 1.5
    assert len(found.trials) >= 3


def test_a_reading_that_keeps_no_more_tokens_is_no_cause(playground_verifier, texts, monkeypatch):
    monkeypatch.setattr(diagnosis, "MIN_GAIN_NATS", -100.0)
    monkeypatch.setattr(diagnosis, "MIN_T", -1e9)
    found = diagnose(load("eagle3", playground_verifier), playground_verifier, texts, 3)
    assert all(trial.is_better for trial in found.trials)
    assert found.likely_cause is found.acceptance_length_if_fixed is None


@pytest.mark.parametrize(
    ("name", "changes", "cause", "words"),
    [
        (
            "eagle3",
            {"norm_before_residual": False},
            "missing norm",
            "norm_before_residual true instead of false",
        ),
        (
            "eagle3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
            "rope",
            "'rope_theta': 10000.0.*the verifier's",
        ),
        (
            "mtp",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            "rope",
            "the verifier's",
        ),
        (
            "eagle3",
            {"eagle_aux_hidden_state_layer_ids": [14, 15, 16]},
            "wrong layer ids",
            "aux layer ids",
        ),
    ],
)
def test_the_likely_cause_is_named(playground_verifier, texts, name, changes, cause, words):
    found = diagnose(load(name, playground_verifier, **changes), playground_verifier, texts, 3)
    assert found.likely_cause is not None
    assert found.likely_cause.cause == cause
    assert re.search(words, found.likely_cause.description)
    assert found.acceptance_length_if_fixed > found.acceptance_length


@pytest.mark.parametrize(
    ("name", "causes"),
    [
        ("eagle3", {"wrong layer ids", "missing norm", "position shift"}),
        ("peagle", {"wrong layer ids", "missing norm", "position shift"}),
        ("dflash", {"wrong layer ids", "position shift"}),
        ("mtp", {"position shift", "hidden-state timing"}),
    ],
)
def test_every_algorithm_has_its_suspects(name, causes, verifier):
    model = make_draft(name, verifier)
    # The small verifier's rope is the drafts' own: nothing to suspect there.
    assert {suspect.cause for suspect in suspects(model, verifier)} == causes


def test_trying_suspects_leaves_the_draft_as_it_is(verifier):
    model = make_draft("eagle3", verifier)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    text = see(verifier, [5, 9, 17], list(range(20, 40)))
    diagnose(model, verifier, [text], 3)
    assert model.config.to_dict() == config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
