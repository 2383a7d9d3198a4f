import copy
import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from speculators_core.batch import Batch
from speculators_core.decoding.drafter import Chooser
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig, own_fields
from speculators_core.models.parts.losses import LOSSES
from speculators_core.models.peagle import (
    Elements,
    PEagleDraftModel,
    PEagleObjective,
    PEagleRecipe,
    PEagleSpeculatorConfig,
    draw_elements,
    readable_rows,
)
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
    proposed_probs_error,
    recorded_metric,
    seen,
    served,
    without,
)

VARIANTS: dict[str, dict] = {
    "plain": {"norm_before_residual": False, "norm_before_fc": False},
    "norm_before_residual": {"norm_before_fc": False},
    "norm_before_fc": {"norm_before_residual": False},
    "fc_norm": {"fc_norm": True, "norm_before_fc": False},
    "qwen3": {"layer_type": "qwen3"},
    "two_layers": {"num_layers": 2},
    "sliding": {"sliding_window": 6},
    "window_shorter_than_the_chain": {"sliding_window": 2, "num_layers": 2},
    "two_sliding_qwen3_layers": {"num_layers": 2, "layer_type": "qwen3", "sliding_window": 4},
    "one_aux_layer": {"aux_layer_ids": (2,)},
    "five_aux_layers": {"aux_layer_ids": (0, 1, 2, 3, 4)},
}
NUM_DEPTHS = 5


@functools.cache
def lively_draft(variant: str = "plain") -> PEagleDraftModel:
    model = make_draft("peagle", lively_verifier(), **VARIANTS[variant])
    liven(model)
    return model


def all_elements(document: Batch, num_depths: int = NUM_DEPTHS) -> Elements:
    """Every depth of every row of one document whose row has a next token."""
    last = document.input_ids.shape[1] - 1
    pairs = [(a, d) for a in range(last) for d in range(num_depths) if a + d < last]
    anchors, depths = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return Elements(anchors, depths)


def elements_of(*pairs: tuple[int, int]) -> Elements:
    anchors, depths = torch.tensor(pairs).unbind(1)
    return Elements(anchors, depths)


# ---- another implementation's speculator ----


@pytest.fixture(scope="module")
def interop() -> PEagleDraftModel:
    return SpeculatorModel.from_pretrained(
        INTEROP / "peagle", verifier_attachment_mode="train_only", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def recorded():
    return interop_case("peagle")


def recorded_elements(case) -> tuple[Elements, torch.Tensor]:
    """The recorded elements in our order, and their numbers in the recorded one.

    Rows were recorded of the row without each document's last token.
    """
    documents = case["document_ids"]
    kept = torch.tensor([i for i in range(95) if documents[i] == documents[i + 1]])
    anchors, depths = kept[case["expected.anchor"]], case["expected.depth"]
    order = torch.argsort(anchors * 10 + depths)
    return Elements(anchors[order], depths[order]), order


def logits_error(model: PEagleDraftModel, case, batch: Batch) -> float:
    elements, order = recorded_elements(case)
    with torch.no_grad():
        logits = model.lm_head(model.states(batch, elements))[0]
    is_recorded = order % 4 == 0  # every fourth element's were
    expected = case["expected.logits"][order[is_recorded] // 4]
    return (logits[is_recorded] - expected).abs().max().item()


def test_interop_logits_are_the_recorded_ones(interop, recorded):
    assert len(recorded[0]["expected.logits"]) == 82
    assert logits_error(interop, *recorded) < 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_interop_losses_are_the_recorded_ones(interop, recorded, name):
    case, batch = recorded
    elements, _ = recorded_elements(case)
    train, _ = interop.get_trainer_kwargs(loss=name)
    _, loss, metrics = interop(batch, elements=elements, **train)
    assert loss.item() == pytest.approx(case[f"expected.loss.{name}"].item(), abs=1e-4)
    assert metrics.keys() == {"loss", "full_acc", "acc_0", "acc_1", "acc_2", "acc_3"}
    for metric, value in metrics.items():
        expected = recorded_metric(case, name, metric)
        assert value.item() == pytest.approx(expected, abs=1e-4), metric


def test_interop_round_trip_keeps_tensors_and_meaning(tmp_path):
    check_round_trip("peagle", tmp_path)


@pytest.mark.parametrize(
    "what",
    [
        "aux states shifted",
        "layers swapped",
        "tokens shifted",
        "a position left out",
        "documents merged",
    ],
)
def test_misaligned_row_misses_the_recorded_logits(interop, recorded, what):
    case, batch = recorded
    assert logits_error(interop, case, misaligned(batch)[what]) > 0.1


def test_misaligned_targets_miss_the_recorded_loss(interop, recorded):
    case, batch = recorded
    elements, _ = recorded_elements(case)
    _, loss, _ = interop(misaligned(batch)["last states shifted"], elements=elements)
    assert abs(loss.item() - case["expected.loss.kl_div"].item()) > 0.1


def test_every_norm_is_needed_for_the_recorded_logits(interop, recorded):
    names = norms_of(interop)
    assert len(names) == 4
    for name in names:
        put_back = without(interop, name)
        error = logits_error(interop, *recorded)
        put_back()
        assert error > 0.1, name
    assert logits_error(interop, *recorded) < 1e-4


# ---- laws ----


@pytest.mark.parametrize("variant", ["plain", "two_sliding_qwen3_layers"])
@given(packings())
@settings(max_examples=15, deadline=None)
def test_packed_documents_lose_and_get_what_they_do_apart(variant, packing):
    model = lively_draft(variant)
    documents, padding = packing
    batch = pack(documents, padding)
    alone = [all_elements(document) for document in documents]
    starts = offsets(documents)
    together = Elements(
        torch.cat([e.anchors + start for e, start in zip(alone, starts, strict=True)]),
        torch.cat([e.depths for e in alone]),
    )
    tokens, loss, _ = model(batch, elements=together)
    num_trained = (tokens >= 0).sum()
    if len(together.anchors):
        states = model.states(batch, together)[0].split([len(e.anchors) for e in alone])
    whole = gradient(model, loss * (num_trained + 1e-5))
    parts, lost = torch.zeros_like(whole), 0.0
    for number, document in enumerate(documents):
        own_tokens, own_loss, _ = model(document, elements=alone[number])
        depths, _, length = own_tokens.shape
        found = tokens[:, :, starts[number] : starts[number] + length]
        assert torch.equal(found[:depths], own_tokens) and (found[depths:] == -1).all()
        own_loss = own_loss * ((own_tokens >= 0).sum() + 1e-5)
        parts, lost = parts + gradient(model, own_loss), lost + own_loss.item()
        if len(alone[number].anchors):
            assert_close(states[number], model.states(document, alone[number])[0])
    assert (loss * (num_trained + 1e-5)).item() == pytest.approx(lost, rel=1e-4, abs=1e-5)
    assert_close(whole, parts, 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_trains_is_what_serves(variant):
    """Each element's logits are those that its anchor's proposal is chosen from."""
    model = lively_draft(variant)
    document = make_document(13, num_aux=model.config.num_aux)
    elements = elements_of(*((a, d) for a in range(12) for d in range(NUM_DEPTHS) if a + d < 12))
    trained = model.lm_head(model.states(document, elements))[0]
    for last, logits in served(model, document, [1, 4, 5, 7, 11, 12], NUM_DEPTHS):
        own = elements.anchors == last - 1
        assert own.any()
        assert_close(logits[elements.depths[own]], trained[own])


@pytest.mark.parametrize("num_tokens", [1, 3, 7])
def test_fewer_or_more_tokens_are_a_chain_cut_or_carried_on(num_tokens):
    model = lively_draft("sliding")
    document = make_document(9)
    elements = elements_of(*((a, d) for a in range(4) for d in range(7 if a == 3 else 1)))
    trained = model.lm_head(model.states(document, elements))[0, elements.anchors == 3]
    ((_, logits),) = served(model, document, [4], num_tokens)
    assert_close(logits, trained[:num_tokens])


@pytest.mark.parametrize("variant", ["plain", "sliding", "two_layers", "two_sliding_qwen3_layers"])
def test_batch_of_unequal_texts_proposes_what_each_does_alone(variant):
    check_batch_equals_rows_alone(lively_draft(variant), 4)


@pytest.mark.parametrize("variant", ["plain", "two_sliding_qwen3_layers"])
def test_rejected_tokens_leave_no_trace(variant):
    check_proposals_leave_no_trace(lively_draft(variant))


@pytest.mark.parametrize(
    ("variant", "num_norms"),
    [("plain", 4), ("norm_before_fc", 5), ("fc_norm", 7), ("qwen3", 7), ("two_layers", 7)],
)
def test_every_norm_has_a_part_in_the_output(variant, num_norms):
    model, document = copy.deepcopy(lively_draft(variant)), make_document(6)
    elements = all_elements(document)
    before, names = model.states(document, elements), norms_of(model)
    assert len(names) == num_norms
    for name in names:
        put_back = without(model, name)
        assert (model.states(document, elements) - before).abs().max() > 0.01, name
        put_back()


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_draft_says_the_same(variant, tmp_path):
    model = lively_draft(variant)
    model.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path, verifier=model.verifier)
    assert again.config.to_dict() == model.config.to_dict()
    document = make_document(8, num_aux=model.config.num_aux)
    elements = all_elements(document)
    assert torch.equal(again.states(document, elements), model.states(document, elements))


# ---- who sees whom, drawn by hand ----


def picture_of(elements: Elements, documents: list[int], **recipe) -> list[str]:
    model = make_draft("peagle", lively_verifier(), **recipe)
    liven(model)
    batch = pack([make_document(n) for n in documents])
    module = model.layers[0].input_layernorm  # reads the elements' tokens
    return seen(lambda: model.states(batch, elements)[0].detach(), module)


def test_elements_see_their_anchors_past_and_their_own_chain():
    elements = elements_of((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0))
    assert picture_of(elements, [6]) == [
        "x.....",  # (0, 0)
        "xx....",  # (0, 1)
        "x.x...",  # (1, 0)
        "x.xx..",  # (1, 1)
        "x.xxx.",  # (1, 2)
        "x.x..x",  # (2, 0)
    ]


def test_elements_see_their_own_document_alone():
    elements = elements_of((0, 0), (0, 1), (1, 0), (3, 0), (3, 1), (4, 0))
    assert picture_of(elements, [3, 3]) == [
        "x.....",  # (0, 0)
        "xx....",  # (0, 1)
        "x.x...",  # (1, 0)
        "...x..",  # (3, 0)
        "...xx.",  # (3, 1)
        "...x.x",  # (4, 0)
    ]


def test_window_counts_back_from_the_elements_own_place():
    elements = elements_of((0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0))
    assert picture_of(elements, [6], sliding_window=2) == [
        "x.....",  # (0, 0)
        "xx....",  # (1, 0)
        ".xx...",  # (2, 0)
        "..xx..",  # (2, 1)
        "...xx.",  # (2, 2)
        "..x..x",  # (3, 0)
    ]


# ---- conditional drop of depths ----


def drawn(batch: Batch, seed: int = 0, **objective) -> Elements:
    torch.manual_seed(seed)
    reads = readable_rows(batch)
    trained = reads & torch.cat([batch.loss_mask[0, 1:], torch.tensor([False])])
    return draw_elements(reads, trained, PEagleObjective(**objective))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 40 rows have a loss: 39, 38 and 37 of them can have depths 1, 2 and 3.
        ({"down_sample_ratio": 1.0}, [40, 39, 38, 37]),
        ({"down_sample_ratio": 0.5, "down_sample_ratio_min": 0.0}, [40, 19, 9, 4]),
        ({"down_sample_ratio": 0.5, "down_sample_ratio_min": 0.2}, [40, 19, 9, 7]),
        ({"down_sample_ratio": 0.5, "down_sample_ratio_min": 0.4}, [40, 19, 15, 14]),
        (
            {"down_sample_ratio": 0.5, "down_sample_ratio_min": 0.0, "max_anchors": 20},
            [40, 9, 4, 2],
        ),
        ({"down_sample_ratio": 1.0, "max_anchors": None}, [40, 39, 38, 37]),
    ],
)
def test_depths_keep_their_share_of_rows(objective, expected):
    for seed in range(5):
        elements = drawn(make_document(41), seed, num_depths=4, **objective)
        assert elements.depths.bincount().tolist() == expected


def test_defaults_are_the_papers():
    objective = PEagleObjective()
    assert (objective.down_sample_ratio, objective.down_sample_ratio_min) == (0.7, 0.2)
    assert (objective.num_depths, objective.max_anchors) == (8, 512)


@given(
    packings(longest=30),
    st.integers(1, 6),
    st.sampled_from([0.3, 0.7, 1.0]),
    st.sampled_from([0.0, 0.2, 0.9]),
    st.sampled_from([None, 3, 12]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_drawn_chains_have_no_gap_and_stay_in_their_document(
    packing, num_depths, ratio, least, max_anchors, seed
):
    batch = pack(*packing)
    documents, mask = batch.document_ids[0], batch.loss_mask[0]
    elements = drawn(
        batch,
        seed,
        num_depths=num_depths,
        down_sample_ratio=ratio,
        down_sample_ratio_min=least,
        max_anchors=max_anchors,
    )
    pairs = list(zip(elements.anchors.tolist(), elements.depths.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    readable = [i for i in range(len(mask) - 1) if documents[i] == documents[i + 1] >= 0]
    assert [a for a, d in pairs if d == 0] == readable
    trained = [row for row in readable if mask[row + 1]]
    num_seeds = min(len(trained), max_anchors or len(trained))
    pool = [row for row in trained if row - 1 in readable]
    for depth in range(1, num_depths):
        rows = [a + d for a, d in pairs if d == depth]
        count = int(max(0, num_seeds - depth) * max(ratio**depth, least))
        if depth > 1 or max_anchors is None:  # else the first pool is drawn as well
            assert len(rows) == min(count, len(pool))
        assert len(rows) <= count
        pool = [row + 1 for row in rows if row + 1 in trained]
        for row in rows:
            assert documents[row - depth] == documents[row] == documents[row + 1]
            assert (row - depth, depth - 1) in pairs
            assert row in trained


def test_rows_without_loss_have_depth_zero_alone():
    document = make_document(12, [False] * 6 + [True] * 6)
    elements = drawn(document, num_depths=3, down_sample_ratio=1.0)
    deeper = elements.depths > 0
    assert set(elements.rows[deeper].tolist()) <= set(range(5, 11))
    assert elements.anchors[~deeper].tolist() == list(range(11))


def test_draw_is_repeatable_and_differs_between_seeds():
    batch = pack([make_document(20), make_document(20)])
    first, again, other = (drawn(batch, seed) for seed in (0, 0, 1))
    assert torch.equal(first.anchors, again.anchors) and torch.equal(first.depths, again.depths)
    assert not torch.equal(first.rows, other.rows)


def test_training_draws_elements_anew_each_time():
    model, batch = lively_draft(), pack([make_document(30), make_document(20)])
    torch.manual_seed(0)
    first, second = (model(batch)[0] for _ in range(2))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


# ---- the loss ----


def test_loss_is_one_mean_over_elements_that_read_a_token_with_loss():
    """Elements of the first document's last row are there, and read no token of it."""
    model = lively_draft()
    mask = [True, False, True, True, False, True, True, True]
    batch = pack([make_document(8, mask), make_document(4)])
    elements = elements_of(*((a, d) for a in range(8) for d in range(3) if a + d < 8))
    objective = PEagleObjective(loss={"ce": 0.1, "tv": 0.9})
    tokens, loss, metrics = model(batch, objective, elements)
    logits = model.lm_head(model.states(batch, elements))[0]
    targets = model.verifier_head(batch.last_hidden_states)[0][elements.rows + 1]
    trained = torch.tensor([row + 1 in (2, 3, 5, 6, 7) for row in elements.rows.tolist()])
    each = 0.1 * LOSSES["ce"](logits, targets) + 0.9 * LOSSES["tv"](logits, targets)
    assert loss.item() == pytest.approx(each[trained].mean().item(), rel=1e-5)
    assert metrics["loss"].item() == loss.item()
    found = tokens[elements.depths, 0, elements.rows]
    assert torch.equal(found, torch.where(trained, logits.argmax(-1), -1))
    assert (tokens >= 0).sum() == trained.sum()


@pytest.mark.parametrize("lengths", [[1, 1], [], [5]])
def test_row_with_nothing_to_train_loses_nothing(lengths):
    model = lively_draft()
    documents = [make_document(n, [False] * n) for n in lengths]
    tokens, loss, _ = model(pack(documents, padding=3))
    assert loss.item() == 0.0 and (tokens == -1).all()
    assert gradient(model, loss).abs().max() == 0.0


@pytest.mark.parametrize("trains", [False, True])
def test_embeddings_train_where_they_shall_and_the_head_never(trains):
    model = make_draft("peagle", lively_verifier(), embed_requires_grad=trains)
    liven(model)
    model(make_document(20))[1].backward()
    assert model.embed_tokens.weight.requires_grad == trains
    if trains:
        gradients = model.embed_tokens.weight.grad.abs().sum(-1)
        assert gradients[model.config.mask_token_id] > 0 and (gradients > 0).sum() > 5
    assert model.lm_head.weight.grad is None
    assert all(weight.grad is None for weight in model.verifier.parameters())
    for name, weight in model.named_parameters():
        assert weight.grad is None or weight.grad.abs().sum() > 0, name
    assert model.mask_hidden.grad.abs().min() > 0


OBJECTIVE_CHANGES = {
    "num_depths": {"num_depths": 3},
    "down_sample_ratio": {"down_sample_ratio": 0.4},
    "down_sample_ratio_min": {"down_sample_ratio_min": 0.6},
    "max_anchors": {"max_anchors": 10},
    "loss": {"loss": "tv"},
}


def test_every_objective_option_changes_the_loss():
    assert OBJECTIVE_CHANGES.keys() == PEagleObjective.model_fields.keys()
    model, document = lively_draft(), make_document(40)
    base = {"num_depths": 5, "down_sample_ratio_min": 0.1}

    def outcome(**change):
        torch.manual_seed(0)
        train, evaluate = model.get_trainer_kwargs(**base | change)
        assert train == evaluate
        tokens, loss, _ = model(document, **train)
        return round(loss.item(), 5), (tokens >= 0).sum(dim=(1, 2)).tolist()

    plain = outcome()
    assert plain == outcome()
    for option, change in OBJECTIVE_CHANGES.items():
        loss, num_elements = outcome(**change)
        assert loss != plain[0], option
        assert (num_elements == plain[1]) == (option == "loss"), option


# ---- a draft fitted to its row needs all that it reads ----


def test_mutated_row_costs_the_fitted_draft():
    """A draft that has learnt one row by heart reads tokens, states and mask state."""
    torch.manual_seed(0)
    model = make_draft("peagle", lively_verifier())
    batch = make_document(60)
    objective = PEagleObjective(num_depths=3, down_sample_ratio=1.0)
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(batch, objective)[1].backward()
        optimizer.step()
    good = model(batch, objective)[1].item()
    assert good < 0.2
    for what, mutated in misaligned(batch).items():
        if what not in ("documents merged", "a position left out"):
            assert model(mutated, objective)[1].item() > 2 * good, what
    model.mask_hidden.data = model.mask_hidden.data.roll(32, dims=-1)
    assert model(batch, objective)[1].item() > 2 * good


# ---- options ----

RECIPE_CHANGES: dict[str, dict] = {
    "layer_type": {"layer_type": "qwen3"},
    "num_layers": {"num_layers": 2},
    "num_attention_heads": {"num_attention_heads": 8},
    "num_key_value_heads": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 16},
    "rms_norm_eps": {"rms_norm_eps": 0.5},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
    "intermediate_size": {"intermediate_size": 48},
    "sliding_window": {"sliding_window": 3},
    "aux_layer_ids": {"aux_layer_ids": (1, 2)},
    "norm_before_residual": {"norm_before_residual": False},
    "norm_before_fc": {"norm_before_fc": False},
    "fc_norm": {"fc_norm": True, "norm_before_fc": False},
    "mask_token_id": {"mask_token_id": 5},
    "embed_requires_grad": {"embed_requires_grad": False},
    "speculative_tokens": {"speculative_tokens": 7},
}


def effect(model: PEagleDraftModel):
    """What an option can change: shapes, what trains, how many tokens, and the states."""
    liven(model)
    document = make_document(8, num_aux=model.config.num_aux)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    trains = [name for name, weight in model.named_parameters() if weight.requires_grad]
    output = model.states(document, all_elements(document)).sum().item()
    return shapes, trains, model.config.proposal.speculative_tokens, round(output, 3)


def test_every_recipe_option_has_an_effect():
    assert {*RECIPE_CHANGES, "max_position_embeddings"} == PEagleRecipe.model_fields.keys()
    verifier = lively_verifier()
    plain = make_draft("peagle", verifier)
    for option, change in RECIPE_CHANGES.items():
        changed = make_draft("peagle", verifier, **change)
        assert changed.config.to_dict() != plain.config.to_dict(), option
        assert effect(changed) != effect(plain), option


def test_mask_token_and_mask_state_are_read_beyond_the_first_token_alone():
    model = copy.deepcopy(lively_draft())
    document = make_document(6)
    elements = elements_of((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2))
    before = model.states(document, elements)[0]
    masked = elements.depths > 0
    for mutate in (
        lambda: setattr(model.config, "mask_token_id", 50),
        lambda: model.mask_hidden.data.mul_(-1.0),
    ):
        mutate()
        after = model.states(document, elements)[0]
        changed = (after - before).abs().amax(-1) > 1e-3
        assert torch.equal(changed, masked)
        before = after


LAYER_CONFIG_CHANGES: dict[str, dict] = {
    "rms_norm_eps": {"rms_norm_eps": 0.5},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
    "hidden_act": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "num_key_value_heads": {"num_key_value_heads": 4},
}


def test_layer_config_keys_have_effects():
    plain = lively_draft()
    for key, change in LAYER_CONFIG_CHANGES.items():
        changed = PEagleDraftModel(changed_config(plain, layer=change))
        changed.embed_tokens.weight.data.copy_(plain.embed_tokens.weight)
        changed.embed_tokens.weight.requires_grad_(False)
        assert effect(changed)[0::3] != effect(plain)[0::3], key


def test_every_config_key_is_known_here():
    """A key that is added needs a test of its effect: those of the recipe, and these."""
    by_recipe = {"norm_before_residual", "norm_before_fc", "fc_norm", "mask_token_id"}
    by_recipe |= {"eagle_aux_hidden_state_layer_ids", "embed_requires_grad"}
    here = {"draft_vocab_size", "target_hidden_size", "norm_output"}
    common = {"speculators_model_type", "transformer_layer_config", "speculators_config"}
    common |= {"tie_word_embeddings"}
    assert set(own_fields(PEagleSpeculatorConfig)) == by_recipe | here | common


def test_norm_output_is_kept_and_means_nothing_in_one_pass():
    model = lively_draft()
    other = PEagleDraftModel(changed_config(model, norm_output=True))
    other.load_state_dict(model.state_dict())
    document = make_document(8)
    elements = all_elements(document)
    assert torch.equal(other.states(document, elements), model.states(document, elements))
    assert other.config.to_dict()["norm_output"] is True


def test_target_hidden_size_is_the_width_of_the_aux_states():
    model = PEagleDraftModel(changed_config(lively_draft("fc_norm"), target_hidden_size=20))
    assert model.fc.weight.shape == (32, 60) and model.mask_hidden.shape == (1, 1, 60)
    assert model.fc_norm[2].weight.shape == (20,)
    document = make_document(6)
    narrow = dataclasses.replace(document, aux_hidden_states=document.aux_hidden_states[..., :60])
    assert model.states(narrow, all_elements(narrow)).isfinite().all()


def test_what_vllm_reads_is_written():
    """Keys that vLLM looks for elsewhere, or that have another default there."""
    written = lively_draft("fc_norm").config.to_dict()
    assert written["mask_token_id"] == 2 and written["norm_before_residual"] is True
    assert written["transformer_layer_config"]["fc_norm"] is True
    assert "fc_norm" not in lively_draft().config.to_dict()["transformer_layer_config"]
    written = lively_draft("five_aux_layers").config.to_dict()
    assert written["transformer_layer_config"]["num_aux_hidden_states"] == 5


def test_checkpoint_holds_embeddings_head_and_mask_state(tmp_path):
    model = lively_draft()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {"embed_tokens.weight", "lm_head.weight", "mask_hidden"} < tensors.keys()
    assert tensors["mask_hidden"].shape == (1, 1, 96)
    assert not any("verifier" in name or "rotary" in name for name in tensors)
    assert torch.equal(tensors["lm_head.weight"], model.verifier.lm_head.weight)


def test_fresh_mask_state_is_standard_normal():
    model = make_draft("peagle", lively_verifier())
    assert 0.7 < model.mask_hidden.std() < 1.3


# ---- reduced vocabulary ----


@pytest.fixture(scope="module")
def reduced() -> PEagleDraftModel:
    torch.manual_seed(1)
    verifier = lively_verifier()
    model = PEagleDraftModel.from_training_args(
        verifier.config, *REDUCED, verifier=verifier, aux_layer_ids=(1, 2, 3), mask_token_id=2
    )
    liven(model)
    return model


def test_reduced_vocabulary_serves_what_it_trains_in_verifier_ids(reduced):
    document = make_document(9)
    elements = elements_of(*((a, 0) for a in range(5)), (5, 0), (5, 1), (5, 2), (5, 3))
    trained = reduced.lm_head(reduced.states(document, elements))[0, -4:]
    ((_, logits),) = served(reduced, document, [6], 4)
    assert logits.shape == (4, 30)
    assert_close(logits, trained)
    assert proposed_probs_error(reduced, document) < 1e-6
    greedy = reduced.propose(
        reduced.start_drafting(), confirm(document, 0, 6, "aux_hidden_states"), 4, Chooser()
    )
    ids = reduced.t2d.nonzero().flatten()
    assert torch.equal(greedy.token_ids[0], ids[trained.argmax(-1)])


def reduced_loss(model: PEagleDraftModel, document: Batch) -> tuple[float, float]:
    """KL over the draft's tokens where the verifier's best is one of them; and the share right."""
    ids = model.t2d.nonzero().flatten()
    elements = all_elements(document, 3)
    logits = model.lm_head(model.states(document, elements))[0]
    targets = model.verifier_head(document.last_hidden_states)[0][elements.rows + 1]
    covered = torch.isin(targets.argmax(-1), ids)
    assert 0 < covered.sum() < len(covered)
    losses = LOSSES["kl_div"](logits, targets[:, ids])[covered]
    right = ids[logits.argmax(-1)] == targets.argmax(-1)
    return losses.mean().item(), right.float().mean().item()


def test_reduced_vocabulary_learns_where_the_verifiers_token_is_in_it(reduced):
    document = make_document(40)
    _, loss, metrics = reduced(document, elements=all_elements(document, 3))
    expected = reduced_loss(reduced, document)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert metrics["full_acc"].item() == pytest.approx(expected[1])


def test_d2t_off_by_one_is_noticed(reduced):
    document = make_document(40)
    mutant = copy.deepcopy(reduced)
    mutant.d2t -= 1
    assert proposed_probs_error(mutant, document) > 1e-3
    loss = mutant(document, elements=all_elements(document, 3))[1].item()
    assert abs(loss - reduced_loss(mutant, document)[0]) > 1e-3
    with pytest.raises(SpeculatorError, match="contradict"):
        mutant.check_tensors({"t2d": mutant.t2d, "d2t": mutant.d2t})


def test_reduced_vocabulary_survives_save_and_load(reduced, tmp_path):
    reduced.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert again.config.draft_vocab_size == 30
    assert torch.equal(again.draft_token_ids, reduced.draft_token_ids)
    assert torch.equal(again.lm_head.weight, reduced.verifier.lm_head.weight[again.draft_token_ids])


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token_id": None}, "mask_token_id is missing"),
        (
            {"mask_token_id": 2048},
            "mask_token_id 2048 is not in the vocabulary: expected 0 to 2047",
        ),
        ({"mask_token_id": -1}, "mask_token_id: .* greater than or equal to 0"),
        ({"norm_before_fc": True, "fc_norm": True}, "exclude each other"),
        ({"draft_vocab_size": 4096}, "expected at most 2048, the verifier's vocabulary"),
    ],
)
def test_bad_key_is_named_in_one_line(change, message):
    with pytest.raises(SpeculatorError, match=message) as caught:
        SpeculatorModelConfig.from_dict({**interop_config("peagle"), **change})
    assert "\n" not in str(caught.value)


def test_layers_that_nobody_serves_are_refused():
    config = interop_config("peagle")
    config["transformer_layer_config"]["model_type"] = "qwen2"
    with pytest.raises(SpeculatorError, match="'qwen2' has no draft layers; expected one of llama"):
        SpeculatorModelConfig.from_dict(config)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask_token_id": None}, "mask_token_id"),
        ({"mask_token_id": 96}, "mask_token_id 96 is not in the vocabulary: expected 0 to 95"),
        ({"num_layer": 2}, "num_layer"),
        ({"layer_type": "gemma"}, "layer_type"),
        ({"aux_layer_ids": (3, 1)}, "ascending"),
        ({"norm_output": True}, "norm_output"),
        ({"speculative_tokens": 0}, "speculative_tokens"),
    ],
)
def test_bad_training_argument_is_named(kwargs, message):
    with pytest.raises(SpeculatorError, match=message):
        make_draft("peagle", lively_verifier(), **kwargs)


def test_mask_token_must_be_given():
    with pytest.raises(SpeculatorError, match="mask_token_id is missing"):
        PEagleDraftModel.from_training_args(lively_verifier().config, aux_layer_ids=(1, 2, 3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_depths": 0}, "num_depths"),
        ({"down_sample_ratio": 0.0}, "down_sample_ratio"),
        ({"down_sample_ratio": 1.1}, "down_sample_ratio"),
        ({"down_sample_ratio_min": -0.1}, "down_sample_ratio_min"),
        ({"max_anchors": 0}, "max_anchors"),
        ({"loss": "l2"}, "unknown loss 'l2'; expected one of kl_div"),
        ({"ttt_steps": 3}, "ttt_steps"),
    ],
)
def test_bad_objective_is_named(kwargs, message):
    with pytest.raises(SpeculatorError, match=message):
        PEagleDraftModel.get_trainer_kwargs(**kwargs)


def test_checkpoint_without_mask_state_is_refused(tmp_path):
    from tests.format.test_checkpoint import change_tensor

    lively_draft().save_pretrained(tmp_path)
    change_tensor(tmp_path, "mask_hidden", lambda t: None)
    with pytest.raises(SpeculatorError, match="mask_hidden .* is missing"):
        SpeculatorModel.from_pretrained(tmp_path)
