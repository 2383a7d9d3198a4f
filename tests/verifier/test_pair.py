"""A speculator and its verifier are opened once; what is wrong has a cause, whatever its words."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators_core.errors import SpeculatorError
from speculators_core.format import checkpoint
from speculators_core.format.stored_speculator import StoredSpeculator
from speculators_core.format.vocabulary import choose_draft_vocabulary
from speculators_core.verifier.pair import Pair
from tests.conftest import make_draft, make_verifier

MISLEADING = "a missing norm, which has no place: aux layer_ids, layer ids, d2t and t2d, tokenizer"
"""Holds every word by which a cause was once looked for."""


@pytest.fixture
def draft(verifier, verifier_folder, tmp_path):
    """An EAGLE-3 draft with a reduced vocabulary and a norm over aux states."""
    maps = choose_draft_vocabulary({i: 1 for i in range(8, 96)}, 40, 96)
    model = make_draft(
        "eagle3",
        verifier,
        t2d=maps[0],
        d2t=maps[1],
        norm_before_fc=True,
        name_or_path=str(verifier_folder),
    )
    model.save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


def config(**keys):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | keys))

    return change


def layer_config(**keys):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        content["transformer_layer_config"] |= keys
        (folder / "config.json").write_text(json.dumps(content))

    return change


def tensors(edit):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


def tokenizer(folder):
    """One that gives other ids than the verifier's in `another_tokenizer`."""
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def scatter(folder):
    (folder / checkpoint.INDEX).write_text("{")


FAULTS = {
    "unknown algorithm": (config(speculators_model_type="eagle9"), "invalid config"),
    "no algorithm": (config(speculators_model_type=None), "invalid config"),
    "value out of bounds": (config(draft_vocab_size=0), "invalid config"),
    "vocabulary too large": (config(draft_vocab_size=1000), "invalid config"),
    "two norms": (config(fc_norm=True), "invalid config"),
    "unknown dtype": (config(dtype="float9"), "invalid config"),
    "unknown rope": (
        layer_config(rope_parameters={"rope_type": "norm", "rope_theta": 1.0}),
        "invalid config",
    ),
    "layers of another family": (layer_config(model_type="bert"), "invalid config"),
    "negative layer id": (config(eagle_aux_hidden_state_layer_ids=[-1, 1, 2]), "wrong layer ids"),
    "a layer id too many": (
        config(eagle_aux_hidden_state_layer_ids=[0, 1, 2, 3]),
        "wrong layer ids",
    ),
    "layer id too large": (config(eagle_aux_hidden_state_layer_ids=[1, 2, 9]), "wrong layer ids"),
    "no layer ids": (config(eagle_aux_hidden_state_layer_ids=None), "wrong layer ids"),
    "d2t beside another t2d": (tensors(lambda t: t.update(d2t=t["d2t"] + 1)), "d2t offset"),
    "no d2t": (tensors(lambda t: t.pop("d2t")), "d2t offset"),
    "d2t of floats": (tensors(lambda t: t.update(d2t=t["d2t"].float())), "d2t offset"),
    "norm missing": (tensors(lambda t: t.pop("input_norm.weight")), "missing norm"),
    "norm too many": (config(norm_before_fc=False), "missing norm"),
    "NaN": (tensors(lambda t: t["fc.weight"].fill_(float("nan"))), "damaged checkpoint"),
    "NaN in a norm": (tensors(lambda t: t["norm.weight"].fill_(torch.inf)), "damaged checkpoint"),
    "tensor missing": (tensors(lambda t: t.pop("fc.weight")), "damaged checkpoint"),
    "tensor unknown": (tensors(lambda t: t.update(fd=torch.ones(1))), "damaged checkpoint"),
    "weights missing": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "damaged checkpoint",
    ),
    "weights truncated": (truncate, "damaged checkpoint"),
    "index not JSON": (scatter, "damaged checkpoint"),
}


@pytest.fixture
def reworded(monkeypatch):
    """Every message has other words, and names its place alone."""

    def say(self, message, *, cause=None):
        ValueError.__init__(self, MISLEADING)
        self.cause = cause

    monkeypatch.setattr(SpeculatorError, "__init__", say)


def cause_of(speculator, *args, **kwargs):
    with pytest.raises(SpeculatorError) as caught:
        Pair.open(speculator, *args, **kwargs)
    return caught.value.cause


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_speculator_has_its_cause(draft, fault):
    damage, cause = FAULTS[fault]
    damage(draft)
    assert cause_of(draft) == cause


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reworded_message_has_the_same_cause(draft, reworded, fault):
    damage, cause = FAULTS[fault]
    damage(draft)
    assert cause_of(draft) == cause


@pytest.mark.parametrize("words", ["as written", "reworded"])
def test_what_does_not_fit_has_its_cause(draft, tmp_path, words, request):
    make_verifier(hidden_size=40).save_pretrained(tmp_path / "wide")
    other = shutil.copytree(tmp_path / "wide", tmp_path / "other", dirs_exist_ok=True)
    make_verifier().save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0, "a": 1}}}))
    if words == "reworded":
        request.getfixturevalue("reworded")
    assert cause_of(draft, str(tmp_path / "wide")) == "wrong verifier"
    tokenizer(draft)
    assert cause_of(draft, str(other)) == "wrong tokenizer"


def test_what_is_not_the_speculators_fault_has_no_cause(draft, tmp_path):
    assert cause_of("/nowhere") is None
    assert cause_of(draft, "/nowhere") is None
    (tmp_path / "empty").mkdir()
    assert cause_of(draft, str(tmp_path / "empty")) is None
    (tmp_path / "empty" / "config.json").write_text("{")
    assert cause_of(draft, str(tmp_path / "empty")) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "names no verifier (name_or_path is None)"),
        ("", "names no verifier (name_or_path is '')"),
        (".", "names no verifier (name_or_path is '.')"),
        ("/model/from_s3", "names the verifier /model/from_s3, which cannot be read"),
    ],
)
def test_a_verifier_that_is_named_and_not_there_is_called_so(draft, name, said):
    content = json.loads((draft / "config.json").read_text())
    content["speculators_config"]["verifier"]["name_or_path"] = name
    (draft / "config.json").write_text(json.dumps(content))
    with pytest.raises(SpeculatorError) as caught:
        Pair.open(draft)
    assert said in str(caught.value) and "Pass --verifier" in str(caught.value)
    assert caught.value.cause is None


def test_a_pair_has_what_was_read(draft, verifier_folder):
    pair = Pair.open(draft)
    assert pair.verifier == str(verifier_folder)
    assert pair.verifier_config.hidden_size == 32
    assert pair.speculator.folder == draft
    assert pair.speculator.raw == json.loads((draft / "config.json").read_text())
    assert pair.speculator.config.aux_layer_ids == [1, 2, 3]


def test_tensors_are_left_unread_without_weights(draft):
    (draft / "model.safetensors").unlink()
    assert Pair.open(draft, has_weights=False).speculator.config.draft_vocab_size == 40


def test_a_verifier_beside_the_speculator_is_found(draft, verifier_folder, monkeypatch):
    shutil.copytree(verifier_folder, draft.parent / "verifier")
    content = json.loads((draft / "config.json").read_text())
    content["speculators_config"]["verifier"]["name_or_path"] = "../verifier"
    (draft / "config.json").write_text(json.dumps(content))
    monkeypatch.chdir("/")
    assert StoredSpeculator.open(draft).verifier == str(draft.parent / "verifier")
    assert Pair.open(draft).verifier == str(draft.parent / "verifier")
