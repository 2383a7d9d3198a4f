import copy
import dataclasses
import functools
import json

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from speculators_core.batch import Batch
from speculators_core.decoding.drafter import Chooser
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig, own_fields
from speculators_core.models.mtp import (
    MTPDraftModel,
    MTPObjective,
    MTPRecipe,
    MTPSpeculatorConfig,
)
from speculators_core.models.parts.layers import FAMILIES
from speculators_core.models.parts.losses import LOSSES
from speculators_core.models.speculator import SpeculatorModel
from tests.conftest import make_draft
from tests.data import INTEROP, interop_case
from tests.models.laws import (
    REDUCED,
    assert_close,
    changed_config,
    check_batch_equals_rows_alone,
    check_proposals_leave_no_trace,
    check_round_trip,
    confirm,
    gradient,
    interop_config,
    lively_verifier,
    liven,
    make_document,
    misaligned,
    norms_of,
    offsets,
    pack,
    packings,
    served,
    without,
)

STATES = "last_hidden_states"
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
}
SLIDING = {
    "layer_types": ["sliding_attention"] * 4,
    "use_sliding_window": True,
    "sliding_window": 2,
}


def other_family(config):
    torch.manual_seed(0)
    model = {LlamaConfig: LlamaForCausalLM, Qwen2Config: Qwen2ForCausalLM}[type(config)](config)
    liven(model.model.norm)
    return model.eval()


VERIFIERS = {
    "qwen3": lively_verifier,
    "qwen3_with_windows": lambda: lively_verifier(**SLIDING),
    "qwen2": lambda: other_family(Qwen2Config(**SHAPE)),
    "llama": lambda: other_family(LlamaConfig(**SHAPE)),
    "llama_with_biases": lambda: other_family(
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)
    ),
}


@functools.cache
def lively_draft(family: str = "qwen3", state: str = "post_norm") -> MTPDraftModel:
    model = make_draft("mtp", VERIFIERS[family]())
    liven(model)
    model.config.verifier_state = state
    return model


def unrolled(model: MTPDraftModel, batch: Batch, num_steps: int, attention="served"):
    """Logits [steps, rows, vocab]; rows that lack a token at the last step are left out of all."""
    steps = [
        nn.functional.linear(out[0], model.head_weight)
        for out in model.unroll(batch, num_steps, attention)
    ]
    return torch.stack([logits[: len(steps[-1])] for logits in steps])


# ---- another implementation's speculator ----


@pytest.fixture(scope="module")
def interop() -> MTPDraftModel:
    return SpeculatorModel.from_pretrained(
        INTEROP / "mtp", verifier_attachment_mode="train_only", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def case() -> dict[str, torch.Tensor]:
    return interop_case("mtp")[0]


def recorded_document(number: int) -> Batch:
    """Each document was recorded alone."""
    _, batch = interop_case("mtp")
    rows = batch.document_ids[0] == number
    return Batch(**{f.name: getattr(batch, f.name)[:, rows] for f in dataclasses.fields(Batch)})


@pytest.fixture(scope="module")
def document() -> Batch:
    return recorded_document(1)


def step_errors(model, case, batch: Batch, number: int = 1, attention="independent") -> list[float]:
    errors = []
    with torch.no_grad():
        for step, output in enumerate(model.unroll(batch, 3, attention)):
            expected = case[f"expected.logits.doc{number}.step{step}"]
            logits = nn.functional.linear(output[0, : len(expected)], model.head_weight)
            errors.append((logits - expected).abs().max().item())
    return errors


@pytest.mark.parametrize("number", [0, 1])
def test_interop_logits_are_the_recorded_ones(interop, case, number):
    assert interop.config.verifier_state == "post_norm"
    errors = step_errors(interop, case, recorded_document(number), number)
    assert len(errors) == 3 and max(errors) < 1e-4


@pytest.mark.parametrize("number", [0, 1])
def test_interop_loss_is_the_recorded_one(interop, case, number):
    train, _ = interop.get_trainer_kwargs(
        targets="text", attention="independent", step_weights=(1, 1, 1)
    )
    _, loss, metrics = interop(recorded_document(number), **train)
    assert loss.item() == pytest.approx(case[f"expected.loss.doc{number}"].item(), abs=1e-4)
    for step in range(3):
        expected = case[f"expected.metric.doc{number}.loss_step_{step}"].item()
        assert metrics[f"loss_{step}"].item() == pytest.approx(expected, abs=1e-4)


def test_interop_round_trip_keeps_tensors_and_meaning(tmp_path):
    check_round_trip("mtp", tmp_path, added_keys=["verifier_state"])
    written = json.loads((tmp_path / "mtp" / "config.json").read_text())
    assert written["verifier_state"] == "post_norm"


@pytest.mark.parametrize("what", ["last states shifted", "tokens shifted", "a position left out"])
def test_misaligned_row_misses_the_recorded_logits(interop, case, document, what):
    assert min(step_errors(interop, case, misaligned(document)[what])) > 0.1


def test_misread_checkpoint_misses_the_recorded_logits(interop, case, document):
    errors = step_errors(interop, case, document, attention="served")
    assert errors[0] < 1e-4 and min(errors[1:]) > 0.1
    interop.config.verifier_state = "pre_norm"
    errors = step_errors(interop, case, document)
    interop.config.verifier_state = "post_norm"
    assert min(errors) > 0.05


def test_every_norm_is_needed_for_the_recorded_logits(interop, case, document):
    names = norms_of(interop)
    assert len(names) == 7
    for name in names:
        put_back = without(interop, name)
        errors = step_errors(interop, case, document)
        put_back()
        assert min(errors) > 0.1, name
    assert max(step_errors(interop, case, document)) < 1e-4


# ---- laws ----


@pytest.mark.parametrize("attention", ["served", "independent"])
@pytest.mark.parametrize("targets", ["text", "verifier"])
@given(packings())
@settings(max_examples=12, deadline=None)
def test_packed_documents_lose_and_get_what_they_do_apart(attention, targets, packing):
    model = lively_draft()
    documents, padding = packing
    objective = MTPObjective(attention=attention, targets=targets, num_steps=2)
    tokens, loss, metrics = model(pack(documents, padding), objective)
    apart = [model(document, objective) for document in documents]
    for start, (own_tokens, _, _) in zip(offsets(documents), apart, strict=True):
        length = own_tokens.shape[2]
        assert torch.equal(tokens[:, :, start : start + length], own_tokens)
    weighted = 0.0
    for step, weight in enumerate(objective.weights):
        lost, count = 0.0, 0
        for own_tokens, _, own_metrics in apart:
            own_count = (own_tokens[step] >= 0).sum().item()
            if own_count:
                lost += own_metrics[f"loss_{step}"].item() * own_count
            count += own_count
        assert count == (tokens[step] >= 0).sum()
        found = metrics.get(f"loss_{step}", torch.zeros(()))
        assert found.item() == pytest.approx(lost / max(1, count), rel=1e-4, abs=1e-4)
        weighted += weight * found.item()
    assert loss.item() == pytest.approx(weighted, rel=1e-4, abs=1e-5)


def test_packed_documents_pull_at_the_weights_as_they_do_apart():
    model = lively_draft()
    documents = [make_document(9), make_document(7, [False] * 2 + [True] * 5, seed=1)]
    counts, pulls = [], []
    for batch in (pack(documents, 2), *documents):
        tokens, loss, _ = model(batch, MTPObjective(num_steps=1))
        counts.append((tokens >= 0).sum())
        pulls.append(gradient(model, loss * (counts[-1] + 1e-5)))
    assert counts[0] == counts[1] + counts[2] and counts[2] > 0
    assert_close(pulls[0], pulls[1] + pulls[2], 1e-4)


ENDS = [1, 2, 5, 6, 9]


@pytest.mark.parametrize("state", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("family", VERIFIERS)
def test_what_trains_is_what_serves(family, state):
    """Where the draft says what the text says, it is served the states that it was trained on."""
    model, document = lively_draft(family, state), make_document(14)
    trained = unrolled(model, document, 4)
    for last, logits in served(model, document, ENDS, 4, STATES, dictate=True):
        assert_close(logits, trained[:, last - 1])


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_fewer_or_more_tokens_are_steps_cut_or_carried_on(num_tokens):
    model, document = lively_draft(), make_document(14)
    trained = unrolled(model, document, num_tokens)
    for last, logits in served(model, document, ENDS[:-1], num_tokens, STATES, dictate=True):
        assert_close(logits, trained[:, last - 1])


def test_served_attention_is_that_of_decoding_and_independent_is_not():
    """With the draft's own tokens as the text, the unroll says what decoding says."""
    model, document = lively_draft(), make_document(12)
    ((last, logits),) = served(model, document, [6], 3, STATES)
    own_text = document.input_ids.clone()
    own_text[0, last + 1 : last + 4] = logits.argmax(-1)
    own = dataclasses.replace(document, input_ids=own_text)
    assert_close(unrolled(model, own, 3)[:, last - 1], logits)
    apart = unrolled(model, own, 3, "independent")[:, last - 1]
    differences = (apart - logits).abs().amax(-1)
    assert differences[0] < 1e-4 and differences[1:].min() > 0.1


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_batch_of_unequal_texts_proposes_what_each_does_alone(family):
    check_batch_equals_rows_alone(lively_draft(family), 3, states=STATES)


def test_rejected_tokens_leave_no_trace():
    check_proposals_leave_no_trace(lively_draft(), states=STATES)


@pytest.mark.parametrize("family", VERIFIERS)
def test_first_step_is_a_block_of_the_verifiers_own_kind(family):
    """Against Transformers' own block, run causally over the whole document."""
    model, document = lively_draft(family), make_document(9)
    layer, config = model.mtp_layers[0], copy.deepcopy(model.layer_config)
    config._attn_implementation = "sdpa"
    block = FAMILIES[config.model_type].decoder_layer(config, 0).eval()
    weights = {n: w for n, w in layer.state_dict().items() if n in block.state_dict()}
    block.load_state_dict(weights)
    kinds = {name.split(".")[0] for name in layer.state_dict().keys() - weights.keys()}
    assert kinds == {"input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm"}
    tokens, states = document.input_ids[:, 1:], document.last_hidden_states[:, :-1]
    embedding = model.verifier.get_input_embeddings()(tokens)
    normed = model.verifier.get_decoder().norm(states)
    both = torch.cat([layer.token_layernorm(embedding), layer.hidden_layernorm(normed)], dim=-1)
    joined = layer.input_proj(both)
    positions = document.position_ids[:, :-1]
    output = block(joined, position_embeddings=model.rotary_emb(joined, positions))
    expected = model.verifier.lm_head(layer.final_layernorm(output))[0]
    assert_close(unrolled(model, document, 1)[0], expected)


def test_verifiers_windows_do_not_bind_the_draft():
    plain, windowed = lively_draft("qwen3"), lively_draft("qwen3_with_windows")
    layers = windowed.config.transformer_layer_config
    assert layers.layer_types[0] == "sliding_attention" and layers.sliding_window == 2
    document = make_document(10)
    assert torch.equal(unrolled(plain, document, 3), unrolled(windowed, document, 3))


@pytest.mark.parametrize("family", VERIFIERS)
def test_saved_and_loaded_draft_says_the_same(family, tmp_path):
    model, document = lively_draft(family), make_document(8)
    model.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path, verifier=model.verifier)
    assert again.config.to_dict() == model.config.to_dict()
    assert torch.equal(unrolled(again, document, 3), unrolled(model, document, 3))


# ---- who sees whom ----


def changed_rows(batch: Batch, field: str, row: int, attention: str) -> list[str]:
    """Rows of each step that change with one row of a field."""
    model = lively_draft()
    values = getattr(batch, field).clone()
    values[0, row] = values[0, row] + 1
    before = unrolled(model, batch, 3, attention)
    after = unrolled(model, dataclasses.replace(batch, **{field: values}), 3, attention)
    changed = (after - before).abs().amax(-1) > 1e-6
    return ["".join("x" if c else "." for c in step) for step in changed.tolist()]


def test_steps_read_what_they_read_when_served():
    batch = pack([make_document(5), make_document(4)])
    # The state of row 1: all steps of rows 1 to 4, which see its key of step 0.
    assert changed_rows(batch, STATES, 1, "served") == [".xxxx.", ".xxxx.", ".xxxx."]
    # The token of row 3 enters at row 2 of step 0, row 1 of step 1 and row 0 of step 2.
    assert changed_rows(batch, "input_ids", 3, "served") == ["..xxx.", ".xxxx.", "xxxxx."]
    # A later step sees its own key of each earlier step, and of those no other row's.
    batch = pack([make_document(9)])
    assert changed_rows(batch, "input_ids", 5, "served") == ["....xx", "...xxx", "..xxxx"]
    assert changed_rows(batch, "input_ids", 1, "served") == ["xxxxxx", "xxxxxx", "xxxxxx"]


# ---- the loss ----


@pytest.mark.parametrize("targets", ["text", "verifier"])
@pytest.mark.parametrize("attention", ["served", "independent"])
def test_loss_is_the_weighted_sum_of_the_steps_means(targets, attention):
    model = lively_draft()
    mask = [True, True, True, False, True, True, True, False, True, True]
    document = make_document(10, mask)
    loss = {"loss": "rkl"} if targets == "verifier" else {}
    objective = MTPObjective(targets=targets, attention=attention, **loss)
    tokens, loss, metrics = model(document, objective)
    logits = unrolled(model, document, 3, attention)
    verifier = model.verifier_head(document.last_hidden_states)[0]
    expected, all_losses = 0.0, []
    for step, weight in enumerate((0.5102040816, 0.3061224490, 0.1836734694)):
        losses = []
        for row in range(6):  # of ten tokens: the last step of row 5 says the last one
            said = row + 2 + step
            if not mask[said]:
                assert tokens[step, 0, row] == -1
                continue
            own = logits[step, row]
            assert tokens[step, 0, row] == own.argmax()
            if targets == "text":
                losses.append(-own.log_softmax(-1)[document.input_ids[0, said]].item())
            else:
                losses.append(LOSSES["rkl"](own, verifier[said - 1]).item())
        assert (tokens[step, 0, 6:] == -1).all()
        all_losses.append(sum(losses) / len(losses))
        expected += weight * all_losses[-1]
        assert metrics[f"loss_{step}"].item() == pytest.approx(all_losses[-1], rel=1e-4)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_accuracy_is_that_of_the_targets():
    model, mask = lively_draft(), [True, True, True, False, True, True, True, False, True, True]
    document = make_document(10, mask)
    said, _, _ = model(document)
    text, states = document.input_ids.clone(), document.last_hidden_states.clone()
    text[0, 9] = said[2, 0, 5]  # what the last step of row 5 says; no row reads it
    by_text = MTPObjective(targets="text")
    metrics = model(dataclasses.replace(document, input_ids=text), by_text)[2]
    # Rows 0 to 5 but those that say tokens 3 and 7.
    assert metrics["acc_2"].item() == pytest.approx(1 / 5)
    head = model.verifier_head
    states[0, 8] = head.lm_head.weight[said[2, 0, 5]] / head.norm.weight  # read by row 8 alone
    batch = dataclasses.replace(document, last_hidden_states=states)
    assert model(batch)[2]["acc_2"].item() == pytest.approx(1 / 5)
    assert model(batch, by_text)[2]["acc_2"].item() == 0


def test_rows_and_targets_end_with_their_document():
    model = lively_draft()
    batch = pack([make_document(6), make_document(4), make_document(5)], padding=7)
    batch = dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
    tokens, _, _ = model(batch)
    trained = [(tokens[step, 0] >= 0).nonzero().flatten().tolist() for step in range(3)]
    assert trained == [[0, 1, 6, 10]] * 2 + [[0, 1, 10]]  # two steps of the shortest
    tokens, _, _ = model(batch, MTPObjective(num_steps=1))
    assert (tokens[0, 0] >= 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 7, 10, 11, 12]


@pytest.mark.parametrize("lengths", [[1, 1], [], [5], [12]])
def test_row_with_nothing_to_train_loses_nothing(lengths):
    model = lively_draft()
    documents = [make_document(n, [False] * n) for n in lengths]
    tokens, loss, _ = model(pack(documents, padding=3))
    assert loss.item() == 0.0 and (tokens == -1).all()
    assert gradient(model, loss).abs().max() == 0.0


def test_the_block_trains_and_the_verifier_does_not():
    model = make_draft("mtp", lively_verifier())
    liven(model)
    model(make_document(12), MTPObjective(targets="verifier"))[1].backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    assert all(weight.grad is None for weight in model.verifier.parameters())


def test_step_weights_fall_and_sum_to_one():
    assert MTPObjective().weights == pytest.approx([0.5102, 0.3061, 0.1837], abs=1e-4)
    assert MTPObjective(num_steps=2, step_decay=0.5).weights == pytest.approx([2 / 3, 1 / 3])
    assert MTPObjective(step_weights=(3, 2, 1)).weights == [3, 2, 1]


OBJECTIVE_CHANGES = {
    "num_steps": {"num_steps": 2},
    "step_weights": {"step_weights": (1.0, 1.0, 1.0)},
    "step_decay": {"step_decay": 0.9},
    "targets": {"targets": "text"},
    "loss": {"loss": "tv"},
    "attention": {"attention": "independent"},
}


def test_every_objective_option_changes_the_loss():
    assert OBJECTIVE_CHANGES.keys() == MTPObjective.model_fields.keys()
    model, document = lively_draft(), make_document(20)

    def outcome(**change) -> float:
        train, evaluate = model.get_trainer_kwargs(**change)
        assert train == evaluate
        return round(model(document, **train)[1].item(), 5)

    outcomes = [outcome(), *(outcome(**change) for change in OBJECTIVE_CHANGES.values())]
    assert len(set(outcomes)) == len(outcomes), outcomes


# ---- a draft fitted to its row needs all that it reads ----


def test_mutated_row_costs_the_fitted_draft():
    torch.manual_seed(0)
    model = make_draft("mtp", lively_verifier())
    batch = make_document(60)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(batch)[1].backward()
        optimizer.step()
    good = model(batch)[1].item()
    assert good < 0.2
    for what in ("last states shifted", "tokens shifted"):
        assert model(misaligned(batch)[what])[1].item() > 2 * good, what


# ---- options and the checkpoint ----


def test_verifiers_state_is_read_after_its_norm_unless_the_config_says_otherwise(tmp_path):
    post, pre = lively_draft(state="post_norm"), lively_draft(state="pre_norm")
    document = make_document(10)
    normed = post.verifier.get_decoder().norm(document.last_hidden_states)
    assert torch.equal(post.read_verifier(document.last_hidden_states), normed)
    assert torch.equal(pre.read_verifier(document.last_hidden_states), document.last_hidden_states)
    assert (unrolled(post, document, 3) - unrolled(pre, document, 3)).abs().amax(-1).min() > 0.1
    pre.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path, verifier=pre.verifier)
    assert again.config.verifier_state == "pre_norm"
    assert torch.equal(unrolled(again, document, 3), unrolled(pre, document, 3))


def test_fresh_draft_is_shaped_after_its_verifier():
    assert MTPRecipe.model_fields.keys() == {"speculative_tokens"}
    for family, make_verifier in VERIFIERS.items():
        verifier = make_verifier()
        model = make_draft("mtp", verifier, speculative_tokens=5)
        written = model.config.to_dict()
        theirs = {k: v for k, v in verifier.config.to_diff_dict().items() if v is not None}
        for key, value in written["transformer_layer_config"].items():
            if value is not None:
                assert theirs[key] == value, (family, key)
        assert written["verifier_state"] == "post_norm"
        assert model.config.proposal.speculative_tokens == 5
        assert model.config.aux_layer_ids == [verifier.config.num_hidden_layers]


def test_every_config_key_is_known_here():
    """A key that is added needs a test of its effect. One layer is all that the format allows."""
    common = {"speculators_model_type", "transformer_layer_config", "speculators_config"}
    common |= {"tie_word_embeddings"}
    here = {"verifier_state", "num_nextn_predict_layers"}
    assert set(own_fields(MTPSpeculatorConfig)) == here | common


def test_layer_config_keys_have_effects():
    plain, document = lively_draft(), make_document(10)
    before = unrolled(plain, document, 3)
    for change in (
        {"rms_norm_eps": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"num_key_value_heads": 4},
        {"intermediate_size": 48},
        {"head_dim": 16},
    ):
        changed = MTPDraftModel(changed_config(plain, layer=change), plain.verifier)
        liven(changed)
        assert not torch.allclose(unrolled(changed, document, 3), before, atol=1e-3), change


def test_checkpoint_holds_the_block_alone(tmp_path):
    model = lively_draft()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == set(load_file(INTEROP / "mtp" / "model.safetensors"))
    assert tensors["mtp_layers.0.input_proj.weight"].shape == (32, 64)
    alone = SpeculatorModel.from_pretrained(tmp_path)
    with pytest.raises(SpeculatorError, match="no verifier is attached"):
        alone(make_document(9))
    with pytest.raises(SpeculatorError, match="no verifier is attached"):
        next(served(alone, make_document(9), [4], 3, STATES))


def test_embedding_is_joined_before_the_state():
    model = copy.deepcopy(lively_draft())
    document = make_document(8)
    before = unrolled(model, document, 1)
    model.mtp_layers[0].input_proj.weight.data[:, 32:] = 0.0  # the state's half
    states = dataclasses.replace(document, last_hidden_states=document.last_hidden_states.flip(1))
    tokens = dataclasses.replace(document, input_ids=document.input_ids.flip(1))
    blind = unrolled(model, document, 1)
    assert not torch.allclose(blind, before)
    assert torch.equal(unrolled(model, states, 1), blind)
    assert not torch.allclose(unrolled(model, tokens, 1), blind)


def test_biases_of_the_verifiers_block_are_kept(tmp_path):
    model = lively_draft("qwen2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    biases = {n for n in tensors if n.endswith("bias")}
    assert biases == {f"mtp_layers.0.self_attn.{k}_proj.bias" for k in "qkv"}
    mutant = copy.deepcopy(model)
    mutant.mtp_layers[0].self_attn.v_proj.bias.data.zero_()
    document = make_document(6)
    assert (unrolled(mutant, document, 1) - unrolled(model, document, 1)).abs().max() > 0.1


def test_attached_head_is_enough_to_train(tmp_path):
    model, document = lively_draft("qwen2"), make_document(12)
    model.verifier.save_pretrained(tmp_path / "verifier")
    model.save_pretrained(tmp_path / "draft")
    again = SpeculatorModel.from_pretrained(
        tmp_path / "draft",
        verifier=tmp_path / "verifier",
        verifier_attachment_mode="train_only",
    )
    assert again(document)[1].item() == pytest.approx(model(document)[1].item())


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: .*1"),
        ({"verifier_state": "mid_norm"}, "verifier_state: .*'post_norm' or 'pre_norm'"),
    ],
)
def test_bad_key_is_named_in_one_line(change, message):
    with pytest.raises(SpeculatorError, match=message) as caught:
        SpeculatorModelConfig.from_dict({**interop_config("mtp"), **change})
    assert "\n" not in str(caught.value)


def test_blocks_that_we_do_not_have_are_refused():
    config = interop_config("mtp")
    config["transformer_layer_config"]["model_type"] = "gemma3_text"
    with pytest.raises(SpeculatorError, match="no draft layers; expected one of qwen3"):
        SpeculatorModelConfig.from_dict(config)


def test_reduced_vocabulary_is_refused():
    verifier = lively_verifier()
    for maps in (REDUCED, (REDUCED[0], None)):
        with pytest.raises(SpeculatorError, match="t2d and d2t were given; expected none"):
            MTPDraftModel.from_training_args(verifier.config, *maps)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"num_layers": 2}, "num_layers"), ({"speculative_tokens": 0}, "speculative_tokens")],
)
def test_bad_training_argument_is_named(kwargs, message):
    with pytest.raises(SpeculatorError, match=message):
        make_draft("mtp", lively_verifier(), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"step_decay": 0.0}, "step_decay"),
        ({"step_weights": (1.0, 1.0), "num_steps": 3}, "step_weights has 2 weights for 3 steps"),
        ({"targets": "draft"}, "targets: .*'text' or 'verifier'"),
        ({"attention": "full"}, "attention: .*'served' or 'independent'"),
        ({"loss": "l2"}, "unknown loss 'l2'; expected one of kl_div"),
        ({"ttt_steps": 3}, "ttt_steps"),
    ],
)
def test_bad_objective_is_named(kwargs, message):
    with pytest.raises(SpeculatorError, match=message):
        MTPDraftModel.get_trainer_kwargs(**kwargs)


def test_sampled_proposal_has_the_distribution_of_each_step():
    model, document = lively_draft(), make_document(9)
    generator = torch.Generator().manual_seed(0)
    proposal = model.propose(
        model.start_drafting(), confirm(document, 0, 6, STATES), 3, Chooser(0.7, generator)
    )
    assert proposal.probs.shape == (1, 3, 96)
    text = document.input_ids.clone()
    text = torch.cat([text[:, :7], proposal.token_ids, text[:, :2]], dim=1)
    grown = dataclasses.replace(make_document(12), input_ids=text)
    states = torch.cat([document.last_hidden_states, grown.last_hidden_states[:, :3]], dim=1)
    grown = dataclasses.replace(grown, last_hidden_states=states)
    expected = (unrolled(model, grown, 3)[:, 5] / 0.7).softmax(-1)
    assert_close(proposal.probs[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "text", "loss": "tv"}, "loss is for targets 'verifier'"),
        ({"step_weights": (1, 1, 1), "step_decay": 0.5}, "exclude each other"),
    ],
)
def test_options_that_would_be_idle_are_refused(options, message):
    with pytest.raises(SpeculatorError, match=message):
        MTPDraftModel.get_trainer_kwargs(**options)
