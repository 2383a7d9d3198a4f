import copy
import dataclasses
import functools
import json
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from speculators_core.batch import Batch
from speculators_core.decoding.drafter import Chooser
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig, own_fields
from speculators_core.models import dflash
from speculators_core.models.dflash import (
    DFlashDraftModel,
    DFlashObjective,
    DFlashRecipe,
    DFlashSpeculatorConfig,
    position_weights,
)
from speculators_core.models.parts.losses import LOSSES
from speculators_core.models.parts.masks import spans_before
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
from tests.models.parts.test_masks import picture

VARIANTS: dict[str, dict] = {
    "full": {},
    "full_causal": {"causal": True},
    "sliding": {"sliding_window": 6},
    "sliding_causal": {"sliding_window": 6, "causal": True},
    "full_from_anchor": {"sample_from_anchor": True},
    "full_causal_from_anchor": {"causal": True, "sample_from_anchor": True},
    "sliding_from_anchor": {"sliding_window": 6, "sample_from_anchor": True},
    "sliding_causal_from_anchor": {
        "sliding_window": 6,
        "causal": True,
        "sample_from_anchor": True,
    },
    "window_of_one_block": {"sliding_window": 5, "causal": True},
    "blocks_of_4": {"block_size": 4, "num_layers": 1},
    "blocks_of_8": {"block_size": 8, "sliding_window": 8},
    "blocks_of_16": {"block_size": 16, "causal": True},
    "three_layers": {"num_layers": 3},
    "layers_of_llama": {"layer_type": "llama", "sliding_window": 6},
    "one_aux_layer": {"aux_layer_ids": (2,)},
    "five_aux_layers": {"aux_layer_ids": (0, 1, 2, 3, 4)},
}


@functools.cache
def lively_draft(variant: str = "full") -> DFlashDraftModel:
    model = make_draft("dflash", lively_verifier(), **VARIANTS[variant])
    liven(model)
    return model


def with_config(model: DFlashDraftModel, **change) -> DFlashDraftModel:
    """The same weights under another config."""
    other = DFlashDraftModel(changed_config(model, **change), model.verifier)
    other.load_state_dict(model.state_dict())
    return other


def all_rows(document: Batch) -> torch.Tensor:
    return torch.arange(document.input_ids.shape[1])


def logits_of(model: DFlashDraftModel, batch: Batch, anchors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(model.states(batch, anchors), model.head_weight)


# ---- embeddings and a head of its own ----


def with_ends(folder, model: DFlashDraftModel, change: float) -> None:
    """The checkpoint with the verifier's embeddings and head beside it, changed by a factor."""
    model.save_pretrained(folder)
    head = model.verifier_head
    ends = {"embed_tokens.weight": head.embed_tokens.weight, "lm_head.weight": head.lm_head.weight}
    tensors = load_file(folder / "model.safetensors")
    changed = {name: weight.detach().flip(0) * change for name, weight in ends.items()}
    kept = {name: weight.detach().clone() for name, weight in ends.items()}
    save_file(tensors | (kept if change == 1 else changed), folder / "model.safetensors")


def test_embeddings_and_a_head_equal_to_the_verifiers_are_not_kept(tmp_path):
    model = lively_draft()
    with_ends(tmp_path / "draft", model, 1)
    read = SpeculatorModel.from_pretrained(tmp_path / "draft", verifier=model.verifier)
    assert read.embed_tokens is None and read.lm_head is None
    assert read.differing_ends() == []
    read.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == model.state_dict().keys()


def test_embeddings_and_a_head_of_its_own_are_used_as_in_vllm(tmp_path):
    model, batch = lively_draft(), make_document(12)
    with_ends(tmp_path / "draft", model, 0.5)
    read = SpeculatorModel.from_pretrained(tmp_path / "draft", verifier=model.verifier)
    assert read.differing_ends() == ["embed_tokens.weight", "lm_head.weight"]
    anchors = torch.tensor([3])
    flipped = model.verifier_head.embed_tokens.weight.flip(0) * 0.5
    block = read.embed_block(batch.input_ids[0, anchors], 5)
    tokens = torch.tensor([batch.input_ids[0, 3], *[model.config.mask_token_id] * 4])
    assert_close(block[0], flipped[tokens])
    states = read.states(batch, anchors)
    assert_close(logits_of(read, batch, anchors), states @ read.lm_head.weight.T)
    assert not torch.allclose(logits_of(read, batch, anchors), logits_of(model, batch, anchors))
    detached = SpeculatorModel.from_pretrained(tmp_path / "draft")
    detached.save_pretrained(tmp_path / "again")
    again = SpeculatorModel.from_pretrained(tmp_path / "again", verifier=model.verifier)
    assert torch.equal(again.lm_head.weight, read.lm_head.weight)
    assert not any(weight.requires_grad for weight in (again.lm_head.weight,))


def test_a_config_of_llamas_is_kept_and_has_qwen3s_norms(tmp_path):
    model = lively_draft("layers_of_llama")
    assert "layers.0.self_attn.q_norm.weight" in model.state_dict()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["transformer_layer_config"]
    assert written["model_type"] == "llama" and written["sliding_window"] == 6


# ---- another implementation's speculator ----


@pytest.fixture(scope="module")
def interop() -> DFlashDraftModel:
    return SpeculatorModel.from_pretrained(
        INTEROP / "dflash", verifier_attachment_mode="train_only", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def recorded():
    return interop_case("dflash")


def recorded_anchors(case) -> torch.Tensor:
    """Rows with a loss, but for the last eight of the packed row."""
    return case["loss_mask"][:88].nonzero().flatten()


def logits_error(model: DFlashDraftModel, case, batch: Batch) -> float:
    with torch.no_grad():
        logits = logits_of(model, batch, recorded_anchors(case)[::6])  # every sixth's were kept
    return (logits - case["expected.logits"]).abs().max().item()


def test_interop_logits_are_the_recorded_ones(interop, recorded):
    assert len(recorded_anchors(recorded[0])) == recorded[0]["expected.num_anchors"] == 72
    assert logits_error(interop, *recorded) < 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_interop_losses_are_the_recorded_ones(interop, recorded, name):
    case, batch = recorded
    train, _ = interop.get_trainer_kwargs(loss=name)
    _, loss, metrics = interop(batch, anchors=recorded_anchors(case), **train)
    assert loss.item() == pytest.approx(case[f"expected.loss.{name}"].item(), abs=1e-4)
    assert metrics.keys() == {"loss", "full_acc", "eal", *(f"acc_{slot}" for slot in range(1, 8))}
    for metric, value in metrics.items():
        expected = recorded_metric(case, name, metric)
        assert value.item() == pytest.approx(expected, abs=1e-4), metric


def test_interop_round_trip_keeps_tensors_and_meaning(tmp_path):
    check_round_trip("dflash", tmp_path)


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
    shifted = misaligned(batch)["last states shifted"]
    _, loss, _ = interop(shifted, anchors=recorded_anchors(case))
    assert abs(loss.item() - case["expected.loss.kl_div"].item()) > 0.05


def test_every_norm_is_needed_for_the_recorded_logits(interop, recorded):
    names = norms_of(interop)
    assert len(names) == 2 + 2 * 4
    for name in names:
        put_back = without(interop, name)
        error = logits_error(interop, *recorded)
        put_back()
        assert error > 0.1, name
    assert logits_error(interop, *recorded) < 1e-4


def unmask_the_anchor(monkeypatch) -> None:
    def one_more(ends, *args):
        return spans_before(ends + 1, *args)

    monkeypatch.setattr(dflash, "spans_before", one_more)


def test_anchors_own_state_is_hidden_in_the_recorded_logits(interop, recorded, monkeypatch):
    unmask_the_anchor(monkeypatch)
    assert logits_error(interop, *recorded) > 0.1


# ---- laws ----


@pytest.mark.parametrize("variant", ["full", "sliding_causal", "full_causal_from_anchor"])
@given(packings())
@settings(max_examples=12, deadline=None)
def test_packed_documents_lose_and_get_what_they_do_apart(variant, packing):
    model = lively_draft(variant)
    documents, padding = packing
    batch, starts = pack(documents, padding), offsets(documents)
    anchors = torch.cat([all_rows(d) + start for d, start in zip(documents, starts, strict=True)])
    tokens, loss, metrics = model(batch, anchors=anchors)
    states = model.states(batch, anchors)
    num_trained = (tokens >= 0).sum()
    whole = gradient(model, loss * (num_trained + 1e-5))
    parts, lost, num_leading, num_blocks = torch.zeros_like(whole), 0.0, 0.0, 0
    for start, document in zip(starts, documents, strict=True):
        rows = all_rows(document)
        own_tokens, own_loss, own_metrics = model(document, anchors=rows)
        assert torch.equal(tokens[rows + start], own_tokens)
        assert_close(states[rows + start], model.states(document, rows))
        own_loss = own_loss * ((own_tokens >= 0).sum() + 1e-5)
        parts, lost = parts + gradient(model, own_loss), lost + own_loss.item()
        blocks = (own_tokens >= 0).any(-1).sum().item()
        num_blocks += blocks
        num_leading += own_metrics["eal"].item() * blocks
    assert (loss * (num_trained + 1e-5)).item() == pytest.approx(lost, rel=1e-4, abs=1e-5)
    assert_close(whole, parts, 1e-4)
    assert metrics["eal"].item() == pytest.approx(num_leading / max(1, num_blocks), rel=1e-5)


ENDS = [1, 2, 5, 9, 10, 16, 17]


def check_serving(model: DFlashDraftModel) -> None:
    """Each slot's logits are those that its anchor's proposal is chosen from."""
    document = make_document(18, num_aux=model.config.num_aux)
    trained = logits_of(model, document, torch.tensor(ENDS))[:, model.config.first_slot :]
    num_tokens = trained.shape[1]
    assert num_tokens == model.config.proposal.speculative_tokens
    for expected, (_, logits) in zip(
        trained, served(model, document, ENDS, num_tokens), strict=True
    ):
        assert_close(logits, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_trains_is_what_serves(variant):
    check_serving(lively_draft(variant))


@pytest.mark.parametrize("non_causal", [True, False])
@pytest.mark.parametrize("kinds", [("full", "sliding"), ("sliding", "full")])
def test_what_trains_is_what_serves_with_layers_of_two_kinds(non_causal, kinds):
    layer = {
        "layer_types": [f"{kind}_attention" for kind in kinds],
        "sliding_window": 6,
        "use_sliding_window": True,
    }
    model = with_config(lively_draft(), layer=layer, sliding_window_non_causal=non_causal)
    assert [model.config.is_causal(i) for i in range(2)] == [
        kind == "sliding" and not non_causal for kind in kinds
    ]
    check_serving(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_law_notices_the_anchors_own_state(variant, monkeypatch):
    unmask_the_anchor(monkeypatch)
    with pytest.raises(AssertionError):
        check_serving(lively_draft(variant))


@pytest.mark.parametrize("num_tokens", [2, 9, 15])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if "full" in v])
def test_fewer_or_more_tokens_are_blocks_of_another_size(variant, num_tokens):
    model = lively_draft(variant)
    document, first = make_document(18), model.config.first_slot
    resized = with_config(model, block_size=num_tokens + first)
    trained = logits_of(resized, document, torch.tensor(ENDS))[:, first:]
    for expected, (_, logits) in zip(
        trained, served(model, document, ENDS, num_tokens), strict=True
    ):
        assert_close(logits, expected)


def test_causal_blocks_say_the_same_whatever_their_size():
    document = make_document(18)
    for variant in ("full_causal", "sliding_causal_from_anchor"):
        short, long = (
            next(served(lively_draft(variant), document, [9], num_tokens))[1]
            for num_tokens in (2, 5)
        )
        assert_close(short, long[:2])
    short, long = (next(served(lively_draft(), document, [9], n))[1] for n in (2, 5))
    assert (short - long[:2]).abs().max() > 0.1


@pytest.mark.parametrize("variant", ["full", "sliding", "sliding_causal_from_anchor"])
def test_batch_of_unequal_texts_proposes_what_each_does_alone(variant):
    check_batch_equals_rows_alone(lively_draft(variant), 4)


@pytest.mark.parametrize("variant", ["full", "sliding_causal"])
def test_rejected_tokens_leave_no_trace(variant):
    check_proposals_leave_no_trace(lively_draft(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_draft_says_the_same(variant, tmp_path):
    model = lively_draft(variant)
    model.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path, verifier=model.verifier)
    assert again.config.to_dict() == model.config.to_dict()
    document = make_document(12, num_aux=model.config.num_aux)
    anchors = torch.tensor([3, 8])
    assert torch.equal(again.states(document, anchors), model.states(document, anchors))
    objective = DFlashObjective()
    assert torch.equal(
        again(document, objective, anchors)[1], model(document, objective, anchors)[1]
    )


# ---- who sees whom, drawn by hand ----

ONE_LAYER = {"num_layers": 1, "block_size": 3}


def pictures_of(anchors: list[int], documents: list[int], **recipe) -> tuple[list[str], list[str]]:
    """Slots of all blocks (down) against rows of the context, and against all slots (across)."""
    model = make_draft("dflash", lively_verifier(), **ONE_LAYER, **recipe)
    liven(model)
    batch = pack([make_document(n) for n in documents])

    def run() -> torch.Tensor:
        return model.states(batch, torch.tensor(anchors)).detach().flatten(0, 1)

    return seen(run, model.hidden_norm), seen(run, model.layers[0].input_layernorm)


def test_slots_see_the_context_before_their_anchor_and_their_whole_block():
    context, block = pictures_of([2, 4], [6])
    assert context == [
        "xx....",  # anchor 2
        "xx....",
        "xx....",
        "xxxx..",  # anchor 4
        "xxxx..",
        "xxxx..",
    ]
    assert block == [
        "xxx...",
        "xxx...",
        "xxx...",
        "...xxx",
        "...xxx",
        "...xxx",
    ]


@pytest.mark.parametrize("recipe", [{}, {"sliding_window": 7}])
def test_slots_of_a_causal_block_see_it_up_to_themselves(recipe):
    context, block = pictures_of([2, 4], [6], causal=True, **recipe)
    assert context == ["xx....", "xx....", "xx....", "xxxx..", "xxxx..", "xxxx.."]
    assert block == [
        "x.....",
        "xx....",
        "xxx...",
        "...x..",
        "...xx.",
        "...xxx",
    ]


def test_slots_see_their_own_document_alone():
    context, block = pictures_of([0, 2, 5], [3, 3])
    assert context == [
        "......",  # anchor 0
        "......",
        "......",
        "xx....",  # anchor 2: its last slots stand beyond the document
        "xx....",
        "xx....",
        "...xx.",  # anchor 5
        "...xx.",
        "...xx.",
    ]
    assert block == ["xxx......"] * 3 + ["...xxx..."] * 3 + ["......xxx"] * 3


@pytest.mark.parametrize("causal", [False, True])
def test_window_counts_back_from_the_slots_own_place(causal):
    context, block = pictures_of([3, 5], [6], sliding_window=4, causal=causal)
    assert context == [
        "xxx...",  # place 3
        ".xx...",  # place 4
        "..x...",  # place 5
        "..xxx.",  # place 5
        "...xx.",
        "....x.",
    ]
    whole = ["xxx...", "xxx...", "xxx...", "...xxx", "...xxx", "...xxx"]
    upto = ["x.....", "xx....", "xxx...", "...x..", "...xx.", "...xxx"]
    assert block == (upto if causal else whole)


# ---- anchors ----


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"block_size": 4, "sample_from_anchor": False},
            ["xx.", "x.x", ".xx", "xx.", "x..", "...", "x..", "..."],
        ),
        (
            {"block_size": 3, "sample_from_anchor": True},
            ["xxx", "xx.", "x.x", ".x.", "x..", "...", "x..", "..."],
        ),
    ],
)
def test_slots_train_where_their_token_has_a_loss_and_is_of_the_document(config, expected):
    """Documents of six and two tokens; the fourth token has no loss.

    Slot 1 of row 0 stands at row 1. Where slot 0 speaks, each slot says the token after its own.
    """
    model = with_config(lively_draft(), **config)
    batch = pack([make_document(6, [True] * 3 + [False] + [True] * 2), make_document(2)])
    assert picture(model.trained_slots(batch, torch.arange(8))) == expected


def drawn(batch: Batch, max_anchors: int, seed: int = 0, variant: str = "full") -> torch.Tensor:
    torch.manual_seed(seed)
    return lively_draft(variant).draw_anchors(batch, max_anchors)


@pytest.mark.parametrize("variant", ["full", "full_from_anchor"])
@given(packings(longest=40), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_anchors_are_spread_over_documents(variant, packing, max_anchors, seed):
    model, batch = lively_draft(variant), pack(*packing)
    documents, mask = batch.document_ids[0], batch.loss_mask[0]
    trained = model.trained_slots(batch, torch.arange(len(mask))).any(-1)
    possible = [row for row in range(len(mask)) if trained[row] and mask[row]]
    anchors = drawn(batch, max_anchors, seed, variant)
    assert len(anchors) == min(max_anchors, len(possible))
    assert anchors.tolist() == sorted(set(anchors.tolist()) & set(possible))
    for document in range(len(packing[0])):
        share = len(anchors) * sum(documents[row] == document for row in possible)
        count = (documents[anchors] == document).sum().item()
        assert abs(count - share / max(1, len(possible))) < 1


def test_every_row_is_drawn_equally_often():
    batch = pack([make_document(30), make_document(11)])
    often = torch.zeros(41)
    for seed in range(600):
        often[drawn(batch, 13, seed)] += 1
    possible = [*range(29), *range(30, 40)]  # the last token of a document begins no block
    assert often.nonzero().flatten().tolist() == possible
    assert (often[possible] / 600 - 13 / 39).abs().max() < 0.08


def test_draw_is_repeatable_and_differs_between_seeds():
    batch = make_document(50)
    assert torch.equal(drawn(batch, 7), drawn(batch, 7))
    assert len({tuple(drawn(batch, 7, seed).tolist()) for seed in range(5)}) > 1


# ---- the loss ----


def test_exponential_weights_by_hand():
    losses, trained = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    by_four = position_weights(losses, trained, DFlashObjective())
    assert_close(by_four, torch.tensor([[1.0, 0.7788, 0.6065, 0.4724]] * 2), 1e-4)
    by_two = position_weights(losses, trained, DFlashObjective(decay_length=2.0))
    assert_close(by_two, torch.tensor([[1.0, 0.6065, 0.3679, 0.2231]] * 2), 1e-4)


def test_dpace_weights_by_hand():
    """q = e^-CE; u = (q + 1) / 2, 1 where there is no loss; w = the sum of P from the slot on."""
    log = math.log
    losses = torch.tensor(
        [
            [log(2), log(4), 0.0, log(2)],
            [log(2), log(4), 9.0, log(2)],
            [log(2), torch.inf, 0.0, 0.0],  # the draft cannot say what the verifier says
        ]
    )
    trained = torch.tensor([[True] * 4, [True, True, False, True], [True, True, True, False]])
    expected = torch.tensor(
        [
            # u 0.75 0.625 1 0.75    P 0.75 0.46875 0.46875 0.3515625
            [2.0390625, 1.2890625, 0.8203125, 0.3515625],
            # u 0.75 0.625 1 0.75    P 0.75 0.46875   -     0.3515625
            [1.5703125, 0.8203125, 0.0, 0.3515625],
            # u 0.75 0.5   1 -       P 0.75 0.375 0.375 -
            [1.5, 0.75, 0.375, 0.0],
        ]
    )
    objective = DFlashObjective(position_weights="dpace", loss="ce")
    assert_close(position_weights(losses, trained, objective), expected)
    sure = DFlashObjective(position_weights="dpace", loss="ce", dpace_smoothing=1.0)
    counted = torch.tensor([[4.0, 3, 2, 1], [3, 2, 0, 1], [3, 2, 1, 0]])
    assert_close(position_weights(losses, trained, sure), counted)


def loss_by_hand(
    model: DFlashDraftModel, document: Batch, anchors: torch.Tensor, objective: DFlashObjective
) -> float:
    """Slot by slot: what counts, against which row of the verifier, and how much."""
    first = model.config.first_slot
    logits, total, count = logits_of(model, document, anchors), 0.0, 0
    targets, mask = model.verifier_head(document.last_hidden_states)[0], document.loss_mask[0]
    ids = torch.arange(96) if model.draft_token_ids is None else model.t2d.nonzero().flatten()
    for block, anchor in enumerate(anchors.tolist()):
        slots = []
        for slot in range(first, model.config.block_size):
            own, said = anchor + slot, anchor + slot + (0 if first else 1)
            if said < len(mask) and mask[own]:
                target = targets[said - 1]
                (name,) = objective.loss
                loss = LOSSES[name](logits[block, slot], target[ids]).item()
                is_covered = int(target.argmax()) in ids.tolist()
                slots.append((slot - first, loss if is_covered else math.inf, is_covered))
        reached = 1.0
        chances = {}
        for index, loss, _ in slots:
            reached *= 0.5 * math.exp(-loss) + 0.5
            chances[index] = reached
        for index, loss, is_covered in slots:
            weight = math.exp(-index / 4.0)
            if objective.position_weights == "dpace":
                weight = sum(chance for at, chance in chances.items() if at >= index)
            total += weight * loss if is_covered else 0.0
            count += is_covered
    return total / count


@pytest.mark.parametrize("variant", ["full", "full_from_anchor", "sliding_causal"])
@pytest.mark.parametrize(
    "options",
    [{"loss": "kl_div"}, {"loss": "ce"}, {"loss": "ce", "position_weights": "dpace"}],
)
def test_loss_is_the_weighted_sum_by_the_number_of_slots(variant, options):
    objective = DFlashObjective(**options)
    model, anchors = lively_draft(variant), torch.tensor([0, 3, 7, 8, 9])
    document = make_document(12, [True] * 4 + [False, True, True, False] + [True] * 4)
    _, loss, metrics = model(document, objective, anchors)
    expected = loss_by_hand(model, document, anchors, objective)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["loss"].item() == loss.item()


def test_sum_of_losses_is_their_weighted_sum():
    model, document = lively_draft(), make_document(12)
    anchors = torch.tensor([1, 4, 6])

    def loss(weights) -> float:
        return model(document, DFlashObjective(loss=weights), anchors)[1].item()

    assert loss({"ce": 0.1, "tv": 0.9}) == pytest.approx(0.1 * loss("ce") + 0.9 * loss("tv"))


def said_by_verifier(model: DFlashDraftModel, tokens: torch.Tensor) -> torch.Tensor:
    """States before the final norm for which the verifier says these tokens."""
    head = model.verifier_head
    states = head.lm_head.weight[tokens] / head.norm.weight
    assert torch.equal(head(states).argmax(-1), tokens)
    return states.detach()


def test_eal_counts_tokens_up_to_the_first_wrong_one():
    model, document = lively_draft(), make_document(14)
    anchors = torch.tensor([2, 8])
    tokens = model(document, anchors=anchors)[0]  # [blocks, slots 1 to 4]
    rows = anchors[:, None] + torch.arange(4)  # slot s is judged by row p + s - 1

    def metrics_when(right: list[list[int]], without_loss: tuple[int, ...] = ()):
        wanted = torch.where(torch.tensor(right).bool(), tokens, (tokens + 1) % 96)
        states, mask = document.last_hidden_states.clone(), document.loss_mask.clone()
        states[0, rows] = said_by_verifier(model, wanted)
        mask[0, list(without_loss)] = False
        batch = dataclasses.replace(document, last_hidden_states=states, loss_mask=mask)
        metrics = model(batch, anchors=anchors)[2]
        return {name: round(value.item(), 4) for name, value in metrics.items() if name != "loss"}

    assert metrics_when([[1, 1, 0, 1], [0, 1, 1, 1]]) == {
        "eal": (3 + 1) / 2,
        "full_acc": 6 / 8,
        "acc_1": 0.5,
        "acc_2": 1.0,
        "acc_3": 0.5,
        "acc_4": 1.0,
    }
    assert metrics_when([[1, 1, 1, 1], [1, 1, 1, 1]])["eal"] == 5
    # A slot without loss neither counts nor ends the block.
    assert metrics_when([[1, 0, 1, 0], [1, 0, 1, 1]], without_loss=(4,))["eal"] == (3 + 2) / 2
    # A block without any slot to train is no block.
    assert metrics_when([[1, 1, 0, 1], [0, 1, 1, 1]], without_loss=(9, 10, 11, 12))["eal"] == 3


def test_anchors_slot_has_a_token_and_a_metric_of_its_own():
    document, anchors = make_document(14), torch.tensor([2, 8])
    for variant, slots in (("full", range(1, 5)), ("full_from_anchor", range(5))):
        tokens, _, metrics = lively_draft(variant)(document, anchors=anchors)
        assert tokens.shape == (2, len(slots))
        assert {f"acc_{slot}" for slot in slots} == {n for n in metrics if n.startswith("acc_")}


@pytest.mark.parametrize("lengths", [[1, 1], [], [5]])
@pytest.mark.parametrize("variant", ["full", "full_from_anchor"])
def test_row_with_nothing_to_train_loses_nothing(lengths, variant):
    model = lively_draft(variant)
    documents = [make_document(n, [False] * n) for n in lengths]
    for batch in (pack(documents, padding=2), *documents[:1]):
        tokens, loss, metrics = model(batch)
        assert loss.item() == 0.0 and metrics["eal"].item() == 0.0 and (tokens == -1).all()
        assert gradient(model, loss).abs().max() == 0.0


def test_all_but_the_verifiers_ends_trains():
    model = make_draft("dflash", lively_verifier())
    liven(model)
    model(make_document(20))[1].backward()
    assert "embed_tokens.weight" not in model.state_dict()
    assert all(weight.grad is None for weight in model.verifier.parameters())
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


OBJECTIVE_CHANGES = {
    "max_anchors": {"max_anchors": 6},
    "loss": {"loss": "tv"},
    "position_weights": {"position_weights": "dpace", "loss": "ce"},
    "decay_length": {"decay_length": 2.0},
    "dpace_smoothing": {"dpace_smoothing": 0.9, "position_weights": "dpace", "loss": "ce"},
}


def test_every_objective_option_changes_the_loss():
    assert OBJECTIVE_CHANGES.keys() == DFlashObjective.model_fields.keys()
    model, document = lively_draft(), make_document(30)

    def outcome(**change):
        torch.manual_seed(0)
        train, evaluate = model.get_trainer_kwargs(**change)
        assert train == evaluate
        tokens, loss, _ = model(document, **train)
        return round(loss.item(), 5), len(tokens)

    bases = [outcome(), outcome(loss="ce"), outcome(loss="ce", position_weights="dpace")]
    for option, change in OBJECTIVE_CHANGES.items():
        loss, num_blocks = outcome(**change)
        others = bases if option != "position_weights" else bases[:2]
        assert all(loss != base[0] for base in others), option
        assert (num_blocks == 6) == (option == "max_anchors"), option


# ---- a draft fitted to its row needs all that it reads ----


def test_mutated_row_costs_the_fitted_draft():
    torch.manual_seed(0)
    model = make_draft("dflash", lively_verifier(), num_layers=1)
    batch = make_document(60)
    anchors = all_rows(batch)[1:-5]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(batch, anchors=anchors)[1].backward()
        optimizer.step()
    good = model(batch, anchors=anchors)[1].item()
    assert good < 0.2
    for what, mutated in misaligned(batch).items():
        if what not in ("documents merged", "a position left out"):
            assert model(mutated, anchors=anchors)[1].item() > 2 * good, what
    model.config.mask_token_id = 50
    assert model(batch, anchors=anchors)[1].item() > 2 * good


# ---- options ----

RECIPE_CHANGES: dict[str, dict] = {
    "num_layers": {"num_layers": 3},
    "num_attention_heads": {"num_attention_heads": 8},
    "num_key_value_heads": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 16},
    "rms_norm_eps": {"rms_norm_eps": 0.5},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
    "intermediate_size": {"intermediate_size": 48},
    "sliding_window": {"sliding_window": 5},
    "aux_layer_ids": {"aux_layer_ids": (1, 2)},
    "mask_token_id": {"mask_token_id": 5},
    "block_size": {"block_size": 4},
    "causal": {"causal": True},
    "sample_from_anchor": {"sample_from_anchor": True},
}


def effect(model: DFlashDraftModel):
    """What an option can change: shapes, how many tokens are proposed, states and loss."""
    liven(model)
    document, anchors = make_document(12, num_aux=model.config.num_aux), torch.tensor([3, 7])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    output = model.states(document, anchors)[:, :4].sum().item()
    loss = model(document, anchors=anchors)[1].item()
    return shapes, model.config.proposal.speculative_tokens, round(output, 3), round(loss, 5)


def test_every_recipe_option_has_an_effect():
    assert {
        *RECIPE_CHANGES,
        "layer_type",
        "max_position_embeddings",
    } == DFlashRecipe.model_fields.keys()
    verifier = lively_verifier()
    plain = make_draft("dflash", verifier)
    for option, change in RECIPE_CHANGES.items():
        changed = make_draft("dflash", verifier, **change)
        assert changed.config.to_dict() != plain.config.to_dict(), option
        assert effect(changed) != effect(plain), option


def test_speculative_tokens_are_those_that_a_block_says():
    verifier = lively_verifier()
    for block_size in (4, 16):
        for from_anchor in (False, True):
            draft = make_draft(
                "dflash", verifier, block_size=block_size, sample_from_anchor=from_anchor
            )
            expected = block_size if from_anchor else block_size - 1
            assert draft.config.proposal.speculative_tokens == expected


def test_anchors_slot_reads_the_token_and_the_others_the_mask():
    model = copy.deepcopy(lively_draft("full_causal"))
    document, anchors = make_document(8), torch.tensor([3, 6])
    before = model.states(document, anchors)
    model.config.mask_token_id = 50
    changed = (model.states(document, anchors) - before).abs().amax(-1) > 1e-3
    assert changed.tolist() == [[False, True, True, True, True]] * 2
    other = document.input_ids.clone()
    other[:, :3] = 9  # tokens before an anchor are known by their states alone
    after = model.states(dataclasses.replace(document, input_ids=other), anchors)
    assert torch.equal(after, model.states(document, anchors))


LAYER_CONFIG_CHANGES: dict[str, dict] = {
    "rms_norm_eps": {"rms_norm_eps": 0.5},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
    "hidden_act": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
    "num_key_value_heads": {"num_key_value_heads": 4},
    "is_causal": {"is_causal": True},
}


def test_layer_config_keys_have_effects():
    plain = lively_draft()
    for key, change in LAYER_CONFIG_CHANGES.items():
        changed = DFlashDraftModel(changed_config(plain, layer=change), plain.verifier)
        assert effect(changed) != effect(plain), key


def test_every_config_key_is_known_here():
    """A key that is added needs a test of its effect: those of the recipe, and these."""
    by_recipe = {"block_size", "aux_hidden_state_layer_ids", "mask_token_id", "sample_from_anchor"}
    here = {"draft_vocab_size", "target_hidden_size", "sliding_window_non_causal"}
    common = {"speculators_model_type", "transformer_layer_config", "speculators_config"}
    common |= {"tie_word_embeddings"}
    assert set(own_fields(DFlashSpeculatorConfig)) == by_recipe | here | common


def test_target_hidden_size_is_the_width_of_the_aux_states():
    model = DFlashDraftModel(changed_config(lively_draft(), target_hidden_size=20))
    assert model.fc.weight.shape == (32, 60)


# ---- causality, as vLLM reads it ----


@pytest.mark.parametrize(
    ("recipe", "non_causal", "is_causal"),
    [
        ({}, True, None),
        ({"causal": True}, False, True),
        ({"sliding_window": 6}, True, None),
        ({"sliding_window": 6, "causal": True}, False, None),
    ],
)
def test_causality_is_written_so_that_vllm_serves_what_was_trained(recipe, non_causal, is_causal):
    """vLLM: ``is_causal`` of the layers, else not ``sliding_window_non_causal``, for all layers."""
    model = make_draft("dflash", lively_verifier(), **recipe)
    written = model.config.to_dict()
    layers = written["transformer_layer_config"]
    assert written["sliding_window_non_causal"] is non_causal
    assert layers.get("is_causal") is is_causal
    served_causally = layers.get("is_causal", not written["sliding_window_non_causal"])
    assert {model.config.is_causal(i) for i in range(2)} == {served_causally}
    assert served_causally == recipe.get("causal", False)


def test_full_attention_called_causal_is_read_and_written_as_not_causal(caplog):
    config = interop_config("dflash")
    with caplog.at_level(logging.WARNING):
        SpeculatorModelConfig.from_dict(config)
        assert not caplog.records
        for change in ({"sliding_window_non_causal": False}, {}):
            given_config = {k: v for k, v in config.items() if k != "sliding_window_non_causal"}
            read = SpeculatorModelConfig.from_dict(given_config | change)
            assert not read.is_causal(0) and read.sliding_window_non_causal
            assert read.to_dict()["sliding_window_non_causal"] is True
    assert len(caplog.records) == 2
    assert "taken for true" in caplog.text and "\n" not in caplog.records[0].message


@pytest.mark.parametrize("stated", [False, True])
def test_stated_causality_of_the_layers_wins_over_all(stated, caplog):
    for layers in ({}, {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9}):
        for non_causal in (False, True):
            config = interop_config("dflash")
            config["transformer_layer_config"] |= {**layers, "is_causal": stated}
            read = SpeculatorModelConfig.from_dict(
                {**config, "sliding_window_non_causal": non_causal}
            )
            assert read.is_causal(0) == stated
            assert read.sliding_window_non_causal == non_causal
    assert not caplog.records


# ---- the checkpoint ----


def test_checkpoint_holds_neither_embeddings_nor_head(tmp_path):
    model = lively_draft()
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {*load_file(INTEROP / "dflash" / "model.safetensors")}
    alone = SpeculatorModel.from_pretrained(tmp_path)
    with pytest.raises(SpeculatorError, match="no verifier is attached"):
        alone(make_document(9))
    with pytest.raises(SpeculatorError, match="no verifier is attached"):
        next(served(alone, make_document(9), [4], 3))


def test_attached_head_is_enough_to_train(tmp_path):
    model, document = lively_draft(), make_document(9)
    anchors = torch.tensor([2, 4])
    model.verifier.save_pretrained(tmp_path / "verifier")
    model.save_pretrained(tmp_path / "draft")
    again = SpeculatorModel.from_pretrained(
        tmp_path / "draft",
        verifier=tmp_path / "verifier",
        verifier_attachment_mode="train_only",
    )
    expected = model(document, anchors=anchors)[1].item()
    assert again(document, anchors=anchors)[1].item() == pytest.approx(expected)


# ---- reduced vocabulary ----


@pytest.fixture(scope="module")
def reduced() -> DFlashDraftModel:
    torch.manual_seed(1)
    verifier = lively_verifier()
    model = DFlashDraftModel.from_training_args(
        verifier.config,
        *REDUCED,
        verifier=verifier,
        aux_layer_ids=(1, 2, 3),
        mask_token_id=2,
        block_size=5,
        num_layers=2,
    )
    liven(model)
    return model


def test_reduced_vocabulary_serves_what_it_trains_in_verifier_ids(reduced):
    document = make_document(9)
    trained = logits_of(reduced, document, torch.tensor([6]))[0, 1:]
    ((_, logits),) = served(reduced, document, [6], 4)
    assert logits.shape == (4, 30)
    assert_close(logits, trained)
    assert proposed_probs_error(reduced, document) < 1e-6
    ids = reduced.t2d.nonzero().flatten()
    assert torch.equal(reduced.head_weight, reduced.verifier.lm_head.weight[ids])
    greedy = reduced.propose(
        reduced.start_drafting(), confirm(document, 0, 6, "aux_hidden_states"), 4, Chooser()
    )
    assert torch.equal(greedy.token_ids[0], ids[trained.argmax(-1)])


@pytest.mark.parametrize("weights", ["exponential", "dpace"])
def test_reduced_vocabulary_learns_where_the_verifiers_token_is_in_it(reduced, weights):
    document, anchors = make_document(40), torch.arange(3, 30, 4)
    objective = DFlashObjective(loss="ce", position_weights=weights)
    tokens, loss, metrics = reduced(document, objective, anchors)
    assert loss.item() == pytest.approx(loss_by_hand(reduced, document, anchors, objective), 1e-4)
    targets = reduced.verifier_head(document.last_hidden_states)[0].argmax(-1)
    rows = anchors[:, None] + torch.arange(4)
    right = reduced.t2d.nonzero().flatten()[tokens] == targets[rows]
    assert metrics["full_acc"].item() == pytest.approx(right.float().mean().item())


def test_d2t_off_by_one_is_noticed(reduced):
    document, anchors = make_document(40), torch.arange(3, 30, 4)
    mutant = copy.deepcopy(reduced)
    mutant.d2t -= 1
    assert proposed_probs_error(mutant, document) > 1e-3
    with pytest.raises(SpeculatorError, match="contradict"):
        mutant.check_tensors({"t2d": mutant.t2d, "d2t": mutant.d2t})
    objective = DFlashObjective(loss="kl_div")
    good = loss_by_hand(reduced, document, anchors, objective)
    assert abs(mutant(document, objective, anchors)[1].item() - good) > 1e-3


def test_reduced_checkpoint_holds_its_head_and_maps(reduced, tmp_path):
    reduced.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    whole = set(load_file(INTEROP / "dflash" / "model.safetensors"))
    assert set(tensors) - whole == {"lm_head.weight", "d2t", "t2d"}
    assert tensors["lm_head.weight"].shape == (30, 32) and tensors["d2t"].dtype == torch.int64
    again = SpeculatorModel.from_pretrained(tmp_path, verifier=reduced.verifier)
    assert torch.equal(again.draft_token_ids, reduced.draft_token_ids)
    document, anchors = make_document(9), torch.tensor([4])
    assert torch.equal(again.states(document, anchors), reduced.states(document, anchors))


# ---- errors ----


def sliding(window: int) -> dict:
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": window}
    return {
        "transformer_layer_config": interop_config("dflash")["transformer_layer_config"] | layers
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token_id": None}, "mask_token_id is missing"),
        (
            {"mask_token_id": 2048},
            "mask_token_id 2048 is not in the vocabulary: expected 0 to 2047",
        ),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids is missing"),
        ({"block_size": 1}, "block_size: .* greater than or equal to 2"),
        (sliding(7), "sliding_window 7 is smaller than block_size 8"),
        ({"draft_vocab_size": 4096}, "expected at most 2048, the verifier's vocabulary"),
    ],
)
def test_bad_key_is_named_in_one_line(change, message):
    with pytest.raises(SpeculatorError, match=message) as caught:
        SpeculatorModelConfig.from_dict({**interop_config("dflash"), **change})
    assert "\n" not in str(caught.value)


def test_window_of_a_block_is_enough():
    config = SpeculatorModelConfig.from_dict({**interop_config("dflash"), **sliding(8)})
    assert [config.is_causal(i) for i in range(2)] == [False, False]


def test_layers_without_the_sizes_of_a_decoder_are_refused():
    config = interop_config("dflash")
    config["transformer_layer_config"]["model_type"] = "t5"
    del config["transformer_layer_config"]["intermediate_size"]
    with pytest.raises(SpeculatorError, match="'t5' has no .*intermediate_size"):
        SpeculatorModelConfig.from_dict(config)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask_token_id": 96}, "mask_token_id 96 is not in the vocabulary: expected 0 to 95"),
        ({"block_size": 1}, "block_size"),
        ({"sliding_window": 4}, "sliding_window 4 is smaller than block_size 5"),
        ({"layer_type": "gemma3_text"}, "layer_type"),
        ({"aux_layer_ids": (3, 1)}, "ascending"),
        ({"speculative_tokens": 4}, "speculative_tokens"),
    ],
)
def test_bad_training_argument_is_named(kwargs, message):
    with pytest.raises(SpeculatorError, match=message):
        make_draft("dflash", lively_verifier(), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_anchors": 0}, "max_anchors"),
        ({"position_weights": "linear"}, "position_weights"),
        ({"decay_length": 0.0}, "decay_length"),
        ({"dpace_smoothing": 1.5}, "dpace_smoothing"),
        ({"position_weights": "dpace"}, "'dpace' needs the loss 'ce' alone"),
        ({"position_weights": "dpace", "loss": {"ce": 1, "tv": 1}}, "'dpace' needs the loss"),
        ({"loss": "l2"}, "unknown loss 'l2'; expected one of kl_div"),
        ({"num_depths": 3}, "num_depths"),
    ],
)
def test_bad_objective_is_named(kwargs, message):
    with pytest.raises(SpeculatorError, match=message):
        DFlashDraftModel.get_trainer_kwargs(**kwargs)


@pytest.mark.parametrize(
    ("first", "is_warned"), [("full_attention", True), ("sliding_attention", False)]
)
def test_what_vllm_would_serve_otherwise_is_said(verifier, caplog, first, is_warned):
    written = make_draft("dflash", verifier, sliding_window=8, causal=True).config.to_dict()
    written["transformer_layer_config"]["layer_types"][0] = first
    DFlashSpeculatorConfig.from_dict(written)
    assert ("vLLM 0.32 serves every layer causally" in caplog.text) is is_warned


@pytest.mark.parametrize(
    "options",
    [{"dpace_smoothing": 0.1}, {"position_weights": "dpace", "loss": "ce", "decay_length": 2.0}],
)
def test_weights_options_that_would_be_idle_are_refused(options):
    with pytest.raises(SpeculatorError, match="has no effect with position_weights"):
        DFlashDraftModel.get_trainer_kwargs(**options)
