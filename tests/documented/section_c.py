"""Document C: speculators.models."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config

from speculators_core import (
    Batch,
    DFlashDraftModel,
    DFlashSpeculatorConfig,
    Eagle3DraftModel,
    MTPDraftModel,
    PEagleDraftModel,
    SpeculatorError,
    SpeculatorModel,
    SpeculatorModelConfig,
)
from speculators_core.models.mtp import MTPObjective
from tests.conftest import DRAFTS, VOCAB_SIZE, make_batch, make_draft, make_verifier
from tests.documented.rows import proves

SCRIPT = {
    "draft_vocab_size": VOCAB_SIZE,
    "norm_before_residual": True,
    "target_layer_ids": [1, 2, 3],
    "draft_attn_impl": "simple_flex_attention",
    "mask_token_id": 2,
    "block_size": 5,
    "max_anchors": 77,
    "ttt_steps": 2,
    "num_depths": 4,
    "down_sample_ratio": 0.9,
    "down_sample_ratio_min": 0.1,
    "sliding_window_non_causal": False,
    "num_speculative_steps": 3,
}
"""Arguments of a training script, which it passes to whatever algorithm it trains."""
LOSS = {
    "loss_fn": "kl_div",
    "use_off_policy_tokens": False,
    "ttt_steps": 2,
    "ttt_step_loss_decay": 0.5,
    "dflash_decay_gamma": 3.0,
    "num_speculative_steps": 3,
    "step_weight_beta": 0.5,
}


def from_script(name: str, folder, **changes) -> SpeculatorModel:
    shape = make_verifier().config
    shape.num_hidden_layers = 2
    arguments = {**SCRIPT, "verifier_name_or_path": str(folder), **changes}
    return DRAFTS[name].from_training_args(shape, t2d=None, d2t=None, **arguments)


@proves("from_training_args(**kwargs)", "verifier_config.num_hidden_layers")
def training_args(verifier_folder, tmp_path):
    for name in DRAFTS:
        model = from_script(name, verifier_folder)
        assert not model.unset and model.attached is not None
        assert model.config.verifier.name_or_path == str(verifier_folder)
        assert len(model.layers) == (1 if name == "mtp" else 2)
        tokens = {"eagle3": 2, "peagle": 4, "dflash": 4, "mtp": 3}
        assert model.config.proposal.speculative_tokens == tokens[name]
        model.save_pretrained(tmp_path / name)
        loaded = SpeculatorModel.from_pretrained(tmp_path / name)
        assert loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5).shape == (1, 8)
    shape = make_verifier().config.to_dict()
    change = {"num_hidden_layers": 1, "layer_types": None, "model_type": "llama"}
    llama = LlamaConfig(**{**shape, **change})
    arguments = {**SCRIPT, "verifier_name_or_path": str(verifier_folder)}
    draft = Eagle3DraftModel.from_training_args(llama, **arguments)
    assert draft.config.transformer_layer_config.model_type == "llama"
    for change, message in (
        ({"learning_rat": 1.0}, "unknown option learning_rat"),
        ({"draft_vocab_size": 50}, "draft_vocab_size 50 contradicts t2d and d2t"),
        ({"ttt_steps": 2, "speculative_tokens": 3}, "two names of one option"),
    ):
        with pytest.raises(SpeculatorError, match=message):
            from_script("eagle3", verifier_folder, **change)


@proves("get_trainer_kwargs(**kwargs)")
def trainer_kwargs():
    found = {name: DRAFTS[name].get_trainer_kwargs(**LOSS)[0]["objective"] for name in DRAFTS}
    assert (found["eagle3"].ttt_steps, found["eagle3"].ttt_step_loss_decay) == (2, 0.5)
    assert found["dflash"].decay_length == 3.0 and found["peagle"].loss == {"kl_div": 1.0}
    assert found["mtp"].step_decay == 0.5 and len(found["mtp"].weights) == 3
    stated = MTPDraftModel.get_trainer_kwargs(step_weights=[1.0, 0.5], step_weight_beta=0.3)
    assert stated[0]["objective"].weights == [1.0, 0.5]
    with pytest.raises(SpeculatorError, match="unknown option dflash_decay"):
        DFlashDraftModel.get_trainer_kwargs(dflash_decay=3.0)


@proves("use_off_policy_tokens")
def off_policy(monkeypatch):
    verifier = make_verifier()
    model, batch = make_draft("eagle3", verifier), make_batch(verifier)
    train, evaluate = model.get_trainer_kwargs(use_off_policy_tokens=True, ttt_steps=2)
    assert evaluate == model.get_trainer_kwargs(use_off_policy_tokens=False, ttt_steps=2)[0]
    read, step = [], model.step
    monkeypatch.setattr(model, "step", lambda *a, **kw: read.append(a[0]) or step(*a, **kw))
    own, _, own_metrics = model(batch, **train)
    by_text, _, metrics = model(batch, **evaluate)
    assert own_metrics["loss_0"] == metrics["loss_0"] and own_metrics["loss_1"] != metrics["loss_1"]
    assert torch.equal(read[0], read[2]) and torch.equal(read[3], batch.input_ids[:, 2:])
    is_trained = own[0, :, : read[1].shape[1]] >= 0
    assert torch.equal(read[1][is_trained], own[0, :, : read[1].shape[1]][is_trained])


@proves("draft_attn_impl")
def one_attention(verifier_folder):
    losses = set()
    for kind in ("simple_flex_attention", "sdpa", "eager"):
        torch.manual_seed(0)
        model = from_script("dflash", verifier_folder, draft_attn_impl=kind)
        losses.add(model(make_batch(make_verifier()))[1].item())
    assert len(losses) == 1


# ---- keys of configs ----


@proves(
    "DFlashSpeculatorConfig.max_anchors",
    "PEagleSpeculatorConfig num_depths, down_sample_ratio, down_sample_ratio_min",
    "MTPSpeculatorConfig.num_speculative_steps",
)
def training_keys(verifier_folder, tmp_path):
    defaults = {
        "dflash": {"max_anchors": 3072},
        "peagle": {"num_depths": 8, "down_sample_ratio": 0.7, "down_sample_ratio_min": 0.2},
        "mtp": {"num_speculative_steps": 3},
    }
    for name, expected in defaults.items():
        model = make_draft(name, make_verifier())
        assert {key: getattr(model.config, key) for key in expected} == expected
        scripted = from_script(name, verifier_folder).config
        assert {key: getattr(scripted, key) for key in expected} == {k: SCRIPT[k] for k in expected}
        scripted.save_pretrained(tmp_path / name)
        key = next(iter(expected))
        assert json.loads((tmp_path / name / "config.json").read_text())[key] == SCRIPT[key]
        changed = SpeculatorModelConfig.from_pretrained(tmp_path / name, **{key: 2})
        assert getattr(changed, key) == changed.to_dict()[key] == 2
        again = type(changed)(**{**model.config.own_values(), key: 5})
        assert again.stated_objective() == {type(again).objective_keys[key]: 5}
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = changed.nothing
    model = make_draft("dflash", make_verifier())
    every = model(**tensors_of("dflash"))[1]
    model.config.max_anchors = 1
    assert model(**tensors_of("dflash"))[1] != every
    kwargs, _ = model.get_trainer_kwargs(loss_fn="kl_div")
    assert model(**tensors_of("dflash"), **kwargs)[1] != every


@proves("DFlashSpeculatorConfig.sliding_window_non_causal")
def non_causal(verifier_folder):
    whole = from_script("dflash", verifier_folder)
    assert not whole.config.is_causal(0)  # as upstream: full attention sees its whole block
    shape = make_verifier(sliding_window=8, use_sliding_window=True, max_window_layers=0).config
    shape.layer_types = ["sliding_attention"] * 4
    for value in (False, True):
        arguments = {**SCRIPT, "sliding_window_non_causal": value}
        draft = DFlashDraftModel.from_training_args(
            shape, verifier_name_or_path=str(verifier_folder), **arguments
        )
        assert draft.config.is_causal(0) is not value
        assert draft.config.transformer_layer_config.sliding_window == 8


@proves("target_layer_ids", "MTPDraftModel.target_layer_ids", "MTPDraftModel.layers")
def layers():
    verifier = make_verifier()
    for name in ("eagle3", "peagle", "dflash"):
        assert make_draft(name, verifier).target_layer_ids == [1, 2, 3]
    mtp = make_draft("mtp", verifier)
    assert mtp.target_layer_ids == [] and mtp.layers is mtp.mtp_layers


@proves("target_vocab_size")
def vocabulary():
    for name in DRAFTS:
        assert make_draft(name, make_verifier()).config.target_vocab_size == VOCAB_SIZE


@proves("transformer_layer_config of DFlash")
def llama_layers(verifier_folder, tmp_path):
    model = from_script("dflash", verifier_folder)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["transformer_layer_config"]["model_type"] = "llama"
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = SpeculatorModel.from_pretrained(tmp_path)
    assert loaded.config.transformer_layer_config.model_type == "llama"
    batch = make_batch(make_verifier())
    for draft in (model, loaded):
        draft.config.max_anchors = 3072
    assert torch.equal(model(batch)[1], loaded(batch)[1])


@proves("verifier_norm, verifier_lm_head, embed_tokens, lm_head in a checkpoint")
def tensors_too_many(verifier_folder, tmp_path, caplog):
    verifier = make_verifier()
    from_script("dflash", verifier_folder).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    more = {
        "verifier_norm.weight": torch.full((32,), torch.nan),
        "verifier_lm_head.weight": torch.full((VOCAB_SIZE, 32), torch.nan),
        "embed_tokens.weight": verifier.model.embed_tokens.weight.detach().clone(),
        "lm_head.weight": verifier.lm_head.weight.detach().clone(),
    }
    save_file({**stored, **more}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = SpeculatorModel.from_pretrained(tmp_path)
    assert loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5).shape == (1, 8)
    assert "verifier_lm_head.weight" in caplog.text
    assert set(loaded.state_dict()) == set(stored)


# ---- forward of tensors ----


def tensors_of(name: str, batch: Batch | None = None) -> dict[str, torch.Tensor]:
    """A batch as the public library's loader hands it to ``forward``."""
    batch = batch or make_batch(make_verifier(), row_length=15)
    columns = {f.name: getattr(batch, f.name)[0] for f in dataclasses.fields(Batch)}
    if name in ("eagle3", "peagle"):
        documents = columns["document_ids"]
        rows = (documents[1:] == documents[:-1]).nonzero().flatten()
        later = {k: column[rows + 1] for k, column in columns.items()}
        later |= {k: columns[k][rows] for k in ("aux_hidden_states",)}
        columns = later
    return {
        "hidden_states": columns["aux_hidden_states"][None],
        "input_ids": columns["input_ids"][None],
        "document_ids": columns["document_ids"][None],
        "position_ids": columns["position_ids"][None],
        "loss_mask": columns["loss_mask"][None].long(),
        "verifier_last_hidden_states": columns["last_hidden_states"][None],
    }


@proves("SpeculatorModel.forward(input_ids=)", "PEagleDraftModel.forward of tensors")
def forward_tensors():
    verifier = make_verifier()
    batch = make_batch(verifier, row_length=15)
    for name, options in {
        "eagle3": {"ttt_steps": 2, "ttt_step_loss_decay": 0.5},
        "peagle": {"loss_fn": "ce"},
        "dflash": {"gamma": 3.0},
    }.items():
        model = make_draft(name, verifier)
        kwargs, _ = model.trainer_kwargs(options)
        tensors = tensors_of(name, batch)
        torch.manual_seed(0)  # P-EAGLE draws its elements
        tokens, loss, _ = model(batch, **kwargs)
        torch.manual_seed(0)
        found, same, _ = model(**tensors, **options)
        assert torch.allclose(same, loss, atol=1e-5) and loss > 0
        torch.manual_seed(0)
        again = model.forward(**tensors, **model.get_trainer_kwargs(**options)[0])
        assert torch.allclose(again[1], loss, atol=1e-5)
        if name == "eagle3":
            assert [step.shape for step in found] == [(1, 13)] * 2
            assert torch.equal(found[0][0, :8], tokens[0, 0, :8])
        else:
            assert found is None
        model.zero_grad()
        same.backward()
        assert model.fc.weight.grad.abs().sum() > 0
        for change, message in (
            ({"verifier_last_hidden_states": None}, "verifier_last_hidden_states is missing"),
            ({"hidden_states": torch.zeros(1, 3, 7)}, r"hidden_states has shape \[1, 3, 7\]"),
            ({"input_ids": None}, "input_ids is missing"),
            ({"loss_mask": torch.ones(1, 3)}, "loss_mask has shape"),
            ({"nonsense": 1}, "nonsense"),
        ):
            with pytest.raises(SpeculatorError, match=message):
                model(**{**tensors, **change})
        torch.manual_seed(0)
        half = model.to(torch.bfloat16)(**tensors, **options)[1]  # of float32 states
        assert torch.allclose(half.float(), loss.detach(), rtol=0.1)


@proves(
    "MTPDraftModel.forward(input_ids, hidden_states, ...)",
    "MTPDraftModel.forward returns logits_list",
    "MTPDraftModel.forward of short sequences",
)
def mtp_forward():
    verifier = make_verifier()
    model = make_draft("mtp", verifier)
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last = verifier.model(ids, output_hidden_states=True)
    states = last.last_hidden_state  # after the final norm, as the layer reads it
    logits, loss, metrics = model(ids, states, torch.ones_like(ids), step_weights=[1.0, 0.5, 0.25])
    assert [step.shape for step in logits] == [(2, 5, VOCAB_SIZE)] * 3
    expected = sum(
        weight
        * torch.nn.functional.cross_entropy(
            logits[step].flatten(0, 1), ids[:, step + 2 : step + 7].flatten()
        )
        for step, weight in enumerate([1.0, 0.5, 0.25])
    )
    assert torch.allclose(loss, expected) and metrics["loss_sum"] == loss
    loss.backward()
    assert model.layers[0].input_proj.weight.grad.abs().sum() > 0
    one = model(input_ids=ids[1:], hidden_states=states[1:], position_ids=torch.arange(9)[None])
    assert torch.allclose(one[0][2], logits[2][1:], atol=1e-5)  # rows do not see each other
    masked = model(ids, states, loss_mask=torch.ones_like(ids).index_fill(1, torch.tensor(2), 0))
    assert masked[2]["loss_step_0"] != model(ids, states)[2]["loss_step_0"]
    with pytest.raises(SpeculatorError, match="hidden_states is missing"):
        model(ids)
    with pytest.raises(SpeculatorError, match="step_weights has 2 weights"):
        model(ids, states, step_weights=[1.0, 0.5])

    short = model(ids[:, :4], states[:, :4])
    assert [step.shape for step in short[0]] == [(2, 1, VOCAB_SIZE)] * 2 and short[1] > 0
    assert model(ids[:, :2], states[:, :2])[0] == []
    batch = make_batch(verifier, lengths=(4,), row_length=4)
    batch = dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
    tokens, loss, _ = model(batch, MTPObjective(num_steps=3))
    assert (tokens[:, 0] >= 0).tolist() == [[True] + [False] * 3] * 2 + [[False] * 4]
    assert loss > 0
    beside = make_batch(verifier, lengths=(4, 9), row_length=13)
    beside = dataclasses.replace(beside, loss_mask=torch.ones_like(beside.loss_mask))
    both = model(beside, MTPObjective(num_steps=3))[0]
    assert (both[:, 0, :4] >= 0).tolist() == (tokens[:, 0] >= 0).tolist()


# ---- declined ----


@proves("PEagleDraftModel is an Eagle3DraftModel")
def siblings():
    shared = PEagleDraftModel.__mro__[1]
    assert issubclass(Eagle3DraftModel, shared) and issubclass(PEagleDraftModel, shared)


@proves("MTP layers of the verifier's family")
def families():
    config = make_draft("mtp", make_verifier()).config.to_dict()
    config["transformer_layer_config"]["model_type"] = "qwen3_next"
    with pytest.raises(SpeculatorError, match="qwen3_next"):
        SpeculatorModelConfig.from_dict(config)


@proves("cross-tokenizer speculation")
def one_tokenizer():
    config = DFlashSpeculatorConfig(
        transformer_layer_config=Qwen3Config(vocab_size=96, hidden_size=32, num_hidden_layers=1),
        draft_vocab_size=64,
        aux_hidden_state_layer_ids=[1],
        mask_token_id=1,
    )
    assert config.vocabulary.size == 64 and config.target_vocab_size == 96
