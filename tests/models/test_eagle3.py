import copy
import dataclasses
import functools
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speculators_core.batch import Batch
from speculators_core.decoding.drafter import Chooser
from speculators_core.errors import SpeculatorError
from speculators_core.format.vocabulary import choose_draft_vocabulary
from speculators_core.models.eagle3 import Eagle3DraftModel, Eagle3Objective
from speculators_core.models.parts import attention
from speculators_core.models.parts.losses import LOSSES, MASK_SUM_FLOOR
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.verifier import head as verifier_head
from speculators_core.verifier.taps import default_aux_layer_ids
from tests.conftest import make_batch, make_eagle3, make_verifier
from tests.data import INTEROP, interop_case
from tests.format.test_checkpoint import change_tensor
from tests.models.laws import (
    Recorder,
    assert_close,
    check_batch_equals_rows_alone,
    check_proposals_leave_no_trace,
    check_round_trip,
    confirm,
    gradient,
    lively_verifier,
    liven,
    make_document,
    misaligned,
    norms_of,
    offsets,
    pack,
    packings,
    seen,
    served,
    without,
)
from tests.models.parts.test_masks import picture

VARIANTS = {
    "plain": {"norm_before_residual": False, "norm_before_fc": False, "norm_output": False},
    "norm_before_residual": {"norm_before_fc": False, "norm_output": False},
    "norm_before_fc": {"norm_before_residual": False, "norm_output": False},
    "fc_norm": {"fc_norm": True, "norm_before_fc": False},
    "norm_output": {"norm_before_fc": False},
    "qwen3": {"layer_type": "qwen3"},
    "two_layers": {"num_layers": 2},
    "two_qwen3_layers": {"num_layers": 2, "layer_type": "qwen3"},
    "sliding": {"sliding_window": 3},
    "one_aux_layer": {"aux_layer_ids": (2,)},
    "five_aux_layers": {"aux_layer_ids": (0, 1, 2, 3, 4)},
}


@pytest.fixture(scope="module")
def batch(verifier) -> Batch:
    return make_batch(verifier)


@functools.cache
def lively(variant: str, window: int | None = None) -> Eagle3DraftModel:
    """A draft in whose output every weight shows; "reduced" is one with a smaller vocabulary."""
    verifier = lively_verifier()
    recipe = {"aux_layer_ids": (1, 2, 3), **VARIANTS.get(variant, {})}
    if window is not None:
        recipe["sliding_window"] = window
    maps = {}
    if variant == "reduced":
        t2d, d2t = choose_draft_vocabulary({i: i for i in range(20, 90)}, 60, 96, always=[0, 2])
        maps = {"t2d": t2d, "d2t": d2t}
    model = Eagle3DraftModel.from_training_args(
        verifier.config, **maps, verifier=verifier, **recipe
    )
    liven(model)
    return model


def num_aux(model: Eagle3DraftModel) -> int:
    return len(model.aux_layer_ids)


# ---- another implementation's speculator ----


@pytest.fixture(scope="module")
def interop() -> Eagle3DraftModel:
    return SpeculatorModel.from_pretrained(
        INTEROP / "eagle3", verifier_attachment_mode="train_only", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    return interop_case("eagle3")[0]


@pytest.fixture(scope="module")
def case_batch() -> Batch:
    return interop_case("eagle3")[1]


def test_interop_logits_are_the_recorded_ones(interop, case, case_batch):
    documents = case["document_ids"]
    kept = [i for i in range(95) if documents[i] == documents[i + 1]]  # rows of the recorded case
    for step, output in enumerate(interop.unroll(case_batch, 3)):
        logits = interop.lm_head(output)[0]
        expected = case[f"expected.logits.step{step}"]
        rows = [
            (ours, theirs)
            for theirs, ours in enumerate(kept)
            if ours < len(logits) and documents[ours] == documents[ours + 1 + step]
        ]
        assert len(rows) == 94 - 2 * step
        ours, theirs = map(list, zip(*rows, strict=True))
        assert (logits[ours] - expected[theirs]).abs().max() < 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_interop_losses_are_the_recorded_ones(interop, case, case_batch, name):
    train, _ = interop.get_trainer_kwargs(loss=name)
    _, loss, metrics = interop(case_batch, **train)
    assert loss.item() == pytest.approx(case[f"expected.loss.{name}"].item(), abs=1e-4)
    for metric, value in metrics.items():
        key = f"expected.metric.{name}.{metric}"
        expected = case[f"{key}_sum"] / case[f"{key}_total"]
        assert value.item() == pytest.approx(expected.item(), abs=1e-4), metric


def test_interop_round_trip_keeps_every_tensor_and_key(tmp_path):
    check_round_trip("eagle3", tmp_path)


# ---- laws ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_lose_what_they_lose_apart(verifier, variant):
    model = make_eagle3(verifier, **VARIANTS[variant])
    lengths = (9, 6)
    packed = make_batch(verifier, lengths, layer_ids=model.aux_layer_ids)
    objective = Eagle3Objective(loss="kl_div", ttt_steps=3)
    tokens, loss, _ = model(packed, objective)
    total, trained = torch.zeros(3), torch.zeros(3)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = Batch(
            **{f.name: getattr(packed, f.name)[:, rows] for f in dataclasses.fields(Batch)}
        )
        alone_tokens, _, metrics = model(alone, objective)
        counts = (alone_tokens >= 0).sum(dim=(1, 2))
        total += counts * torch.stack([metrics[f"loss_{k}"] for k in range(3)])
        trained += counts
        assert torch.equal(alone_tokens, tokens[:, :, start : start + length])
        start += length
    assert loss.item() == pytest.approx((total / trained).sum().item(), rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_unroll_step_is_what_decoding_proposes(verifier, variant):
    """What trains is what decodes: teacher-forced step 0 against the cached decoder, row by row."""
    model = make_eagle3(verifier, **VARIANTS[variant])
    batch = make_batch(verifier, (10,), 10, layer_ids=model.aux_layer_ids)
    expected = model.lm_head(next(model.unroll(batch, 1)))[0].argmax(-1)  # row i
    state = model.start_drafting()
    for row in range(9):
        proposed = model.propose(
            state, confirm(batch, row, row + 1, "aux_hidden_states"), 1, Chooser()
        )
        assert proposed.token_ids.item() == expected[row].item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_later_unroll_steps_are_what_decoding_proposes(verifier, variant):
    """With the draft's own tokens as the text, the unroll must propose what decoding does."""
    model = make_eagle3(verifier, **VARIANTS[variant])
    batch = make_batch(verifier, (8,), 8, layer_ids=model.aux_layer_ids)
    row = 4
    state = model.start_drafting()
    proposed = model.propose(
        state, confirm(batch, 0, row + 1, "aux_hidden_states"), 3, Chooser()
    ).token_ids
    tokens = batch.input_ids.clone()
    tokens[0, row + 2 : row + 4] = proposed[0, :2]
    steps = model.unroll(dataclasses.replace(batch, input_ids=tokens), 3)
    unrolled = [model.lm_head(output[0, row]).argmax().item() for output in steps]
    assert unrolled == proposed[0].tolist()


LIVELY = [*VARIANTS, "reduced"]


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("variant", ["norm_before_residual", "qwen3", "two_layers", "reduced"])
def test_unroll_logits_are_the_cached_decoders(variant, window):
    """Row for row and step for step; a window counts from the token that the step reads."""
    model, document = lively(variant, window), make_document(15)
    unrolled = [model.lm_head(output)[0] for output in model.unroll(document, 4)]
    for last, logits in served(model, document, [1, 2, 5, 6, 9, 10], 4, dictate=True):
        assert_close(logits, torch.stack([step[last - 1] for step in unrolled]), 1e-4)


@pytest.mark.parametrize("variant", LIVELY)
def test_rejected_tokens_leave_no_trace(variant):
    model = lively(variant)
    check_proposals_leave_no_trace(model, num_aux=num_aux(model))


@pytest.mark.parametrize("variant", LIVELY)
def test_rows_of_a_batch_propose_what_they_propose_alone(variant):
    model = lively(variant)
    check_batch_equals_rows_alone(model, 3, num_aux=num_aux(model))


def count_rows(model: Eagle3DraftModel, batch: Batch, objective: Eagle3Objective) -> Tensor:
    """The rows over which each step's loss is a mean."""
    tokens, _, _ = model(batch, objective)
    best = model.verifier_head(batch.last_hidden_states)[0].argmax(-1)
    ids = torch.arange(96) if model.draft_token_ids is None else model.draft_token_ids
    is_covered = torch.isin(best, ids)
    trained = tokens[:, 0] >= 0
    return torch.stack(
        [(trained[k, : -1 - k] & is_covered[1 + k :]).sum() for k in range(objective.ttt_steps)]
    )


@pytest.mark.parametrize("variant", ["norm_before_residual", "sliding", "two_layers", "reduced"])
@given(packings(), st.integers(1, 30))
@settings(max_examples=12, deadline=None)
def test_packed_documents_lose_and_get_what_they_do_apart(variant, packing, query_block):
    """Tokens, losses and gradients: of each step the mean over all rows, whose documents they are.

    A step's own loss is that of so many steps less that of one step fewer.
    """
    documents, padding = packing
    packed = pack(documents, padding)
    model = lively(variant)
    objectives = [Eagle3Objective(ttt_steps=k + 1, ttt_step_loss_decay=0.7) for k in range(3)]
    with mock.patch.object(attention, "QUERY_BLOCK", query_block):
        tokens, loss, _ = model(packed, objectives[-1])
    num_rows = count_rows(model, packed, objectives[-1]) + MASK_SUM_FLOOR
    apart = torch.zeros(())
    for start, document in zip(offsets(documents), documents, strict=True):
        length = document.input_ids.shape[1]
        runs = [model(document, objective) for objective in objectives]
        assert torch.equal(runs[-1][0], tokens[:, :, start : start + length])
        totals = [run[1] for run in runs]
        steps = torch.stack([totals[0], totals[1] - totals[0], totals[2] - totals[1]])
        share = (count_rows(model, document, objectives[-1]) + MASK_SUM_FLOOR) / num_rows
        apart = apart + (share * steps).sum()
    assert_close(loss, apart)
    assume(apart.requires_grad)  # not where every document is of one token
    assert_close(gradient(model, loss), gradient(model, apart), 1e-4)


@given(packings())
@settings(max_examples=15, deadline=None)
def test_packed_documents_have_the_states_that_they_have_apart(packing):
    documents, padding = packing
    model = lively("two_qwen3_layers")
    together = list(model.unroll(pack(documents, padding), 3))
    for start, document in zip(offsets(documents), documents, strict=True):
        for ours, alone in zip(together, model.unroll(document, 3), strict=False):
            assert_close(ours[:, start : start + alone.shape[1]], alone)


def test_long_rows_in_blocks_equal_one_block(verifier, monkeypatch):
    model = make_eagle3(verifier, sliding_window=5)
    batch = make_batch(verifier, (30, 25), 60)
    _, whole, _ = model(batch)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 7)
    _, parts, _ = model(batch)
    assert whole.item() == pytest.approx(parts.item(), rel=1e-6)


# ---- pictures ----


def test_rows_see_the_states_of_their_document_up_to_their_own():
    """Rows down, states across: what each row of a step depends on, in documents 0 0 0 1 1 1."""
    model = lively("norm_before_residual")
    batch = pack([make_document(3), make_document(3, seed=1)])
    pictures = [
        seen(lambda step=step: list(model.unroll(batch, 3))[step][0].detach(), model.fc)
        for step in range(3)
    ]
    first = ["x....", "xx...", "xxx..", "...x.", "...xx"]
    assert pictures == [first, first[:4], first[:3]]


def test_rows_see_the_tokens_after_their_states():
    """Rows down, tokens across: row i of step k reads token i + 1 + k, and has read those before.

    What a row reads of another document (row 2 here) is not trained.
    """
    model = lively("norm_before_residual")
    batch = pack([make_document(3), make_document(3, seed=1)])
    columns: list[list[Tensor]] = [[], []]
    before = [output[0] for output in model.unroll(batch, 2)]
    for column in range(6):
        ids = batch.input_ids.clone()
        ids[0, column] = 2
        for step, output in enumerate(model.unroll(dataclasses.replace(batch, input_ids=ids), 2)):
            columns[step].append((output[0] - before[step]).abs().amax(1) > 1e-6)
    assert picture(torch.stack(columns[0], dim=1)) == [
        ".x....",
        ".xx...",
        ".xxx..",
        "....x.",
        "....xx",
    ]
    assert picture(torch.stack(columns[1], dim=1)) == [".xx...", ".xxx..", ".xxxx.", "....xx"]


# ---- memory ----


class LargestLogits(TorchDispatchMode):
    """The most rows that any tensor as wide as the vocabulary had."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (self.vocab_size,):
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
        return result


def test_logits_of_a_whole_row_are_never_made(monkeypatch):
    monkeypatch.setattr(verifier_head, "CHUNK_LOGITS", 40 * 113)
    model = make_eagle3(make_verifier(vocab_size=113))
    document = make_document(120)
    with LargestLogits(113) as largest:
        model(document)[1].backward()
    assert largest.rows == 40


# ---- options have effects ----


def test_every_norm_option_changes_the_output(verifier, batch):
    found = {}
    for variant in ("plain", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        model = make_eagle3(verifier, **VARIANTS[variant])
        with torch.no_grad():
            for norm in (m for m in model.modules() if type(m).__name__.endswith("RMSNorm")):
                norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(5))
        found[variant] = round(model(batch)[1].item(), 5)
    assert len(set(found.values())) == len(found), found


def test_sliding_window_hides_far_tokens(verifier):
    batch = make_batch(verifier, (12,), 12)
    other = dataclasses.replace(batch, aux_hidden_states=batch.aux_hidden_states.clone())
    other.aux_hidden_states[:, 0] += 1.0
    for window, sees in ((3, False), (None, True)):
        model = make_eagle3(verifier, sliding_window=window)
        first, second = (next(model.unroll(b, 1))[0, 8] for b in (batch, other))
        assert torch.allclose(first, second) != sees


@pytest.mark.parametrize("trains", [False, True])
def test_embed_requires_grad_really_trains_embeddings(verifier, batch, trains):
    model = make_eagle3(verifier, embed_requires_grad=trains)
    model(batch)[1].backward()
    gradient = model.embed_tokens.weight.grad
    assert (gradient is not None and gradient.abs().sum() > 0) == trains
    assert model.lm_head.weight.grad is None
    assert model.fc.weight.grad.abs().sum() > 0


def test_step_decay_and_steps_count(verifier, batch):
    model = make_eagle3(verifier)
    _, loss, metrics = model(batch, Eagle3Objective(ttt_steps=2, ttt_step_loss_decay=0.5))
    assert "loss_2" not in metrics
    assert loss.item() == pytest.approx((metrics["loss_0"] + 0.5 * metrics["loss_1"]).item())


def test_fresh_draft_starts_from_the_verifiers_ends(verifier):
    model = make_eagle3(verifier)
    assert torch.equal(model.embed_tokens.weight, verifier.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, verifier.lm_head.weight)


# ---- alignment, by mutation ----


def trained_on_itself(verifier, **kwargs) -> tuple[Eagle3DraftModel, Batch]:
    """A draft fitted to one row of three tokens, so that token and states are both needed."""
    model = make_eagle3(verifier, **kwargs)
    batch = make_batch(verifier, (120,), 120, num_tokens=3)
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model(batch)[1].backward()
        optimizer.step()
    return model, batch


def test_mutated_alignment_costs_the_fitted_draft(verifier):
    model, batch = trained_on_itself(verifier)
    good = model(batch)[2]["loss_0"].item()
    assert good < 0.2
    width = verifier.config.hidden_size
    chunks = batch.aux_hidden_states.split(width, dim=-1)
    mutations = {
        "states shifted by one": {"aux_hidden_states": batch.aux_hidden_states.roll(1, dims=1)},
        "layers swapped": {
            "aux_hidden_states": torch.cat([chunks[2], chunks[1], chunks[0]], dim=-1)
        },
        "tokens shifted by one": {"input_ids": batch.input_ids.roll(1, dims=1)},
        "targets shifted by one": {"last_hidden_states": batch.last_hidden_states.roll(1, dims=1)},
    }
    for what, change in mutations.items():
        assert model(dataclasses.replace(batch, **change))[2]["loss_0"].item() > 2 * good, what
    model.norm.weight.data.fill_(1.0)
    model.layers[0].hidden_norm.weight.data.zero_()
    assert model(batch)[2]["loss_0"].item() > 2 * good


def test_misaligned_rows_lose_something_else_than_was_recorded(interop, case, case_batch):
    recorded = case["expected.loss.kl_div"].item()
    for what, batch in misaligned(case_batch).items():
        assert abs(interop(batch)[1].item() - recorded) > 5e-4, what


def test_no_norm_can_be_dropped(interop, case, case_batch):
    recorded = case["expected.loss.kl_div"].item()
    assert len(norms_of(interop)) == 4
    for name in norms_of(interop):
        put_back = without(interop, name)
        assert abs(interop(case_batch)[1].item() - recorded) > 1e-2, name
        put_back()
    assert interop(case_batch)[1].item() == pytest.approx(recorded, abs=1e-4)


@pytest.mark.parametrize("variant", ["norm_before_fc", "fc_norm"])
def test_norms_before_fc_are_the_contracts(variant):
    """One over all states together, or one for each; then fc."""
    model, states = lively(variant), make_document(4).aux_hidden_states

    def normed(x, norm):
        return norm.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    if variant == "norm_before_fc":
        expected = normed(states, model.input_norm)
    else:
        chunks = zip(states.split(32, dim=-1), model.fc_norm, strict=True)
        expected = torch.cat([normed(chunk, norm) for chunk, norm in chunks], dim=-1)
    assert_close(model.combine(states), expected @ model.fc.weight.T)


def test_layers_are_read_ascending(verifier):
    """fc's first columns are the lowest layer's, as vLLM has them."""
    model = make_eagle3(verifier, norm_before_fc=False)
    batch = make_batch(verifier, (6,), 6)
    states = verifier.model(batch.input_ids, output_hidden_states=True).hidden_states
    columns = model.fc.weight.split(32, dim=1)
    expected = sum(states[k] @ column.T for k, column in zip((1, 2, 3), columns, strict=True))
    assert_close(model.combine(batch.aux_hidden_states), expected)


def test_shifted_d2t_is_noticed():
    """Were draft ids read one off, other tokens would be proposed and other targets taken."""
    model, document = lively("reduced"), make_document(20)
    shifted = copy.deepcopy(model)
    shifted.d2t += 1
    assert not torch.isclose(model(document)[1], shifted(document)[1], rtol=1e-2)
    marked = model.t2d.nonzero().flatten()
    assert torch.equal(model.draft_token_ids, marked)
    proposals = [
        draft.propose(
            draft.start_drafting(), confirm(document, 0, 9, "aux_hidden_states"), 4, Chooser()
        ).token_ids
        for draft in (model, shifted)
    ]
    assert torch.isin(proposals[0], marked).all()
    assert (proposals[1] == proposals[0] + 1)[0, 0]


def test_targets_never_cross_a_document_end(verifier):
    model = make_eagle3(verifier)
    batch = make_batch(verifier, (5, 5), 10)
    batch = dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
    tokens, _, _ = model(batch)
    trained = [(tokens[step, 0] >= 0).nonzero().flatten().tolist() for step in range(3)]
    assert trained == [[0, 1, 2, 3, 5, 6, 7, 8], [0, 1, 2, 5, 6, 7], [0, 1, 5, 6]]


# ---- reduced vocabulary ----


@pytest.fixture(scope="module")
def reduced(verifier) -> Eagle3DraftModel:
    t2d, d2t = choose_draft_vocabulary({i: i for i in range(40, 90)}, 30, 96, always=[0, 2])
    torch.manual_seed(1)
    return Eagle3DraftModel.from_training_args(
        verifier.config, t2d, d2t, verifier=verifier, aux_layer_ids=(1, 2, 3)
    )


def test_reduced_vocabulary_proposes_verifier_ids(verifier, reduced, batch, tmp_path):
    ids = reduced.draft_token_ids
    assert torch.equal(reduced.lm_head.weight, verifier.lm_head.weight[ids])
    proposed = reduced.propose(
        reduced.start_drafting(), confirm(batch, 0, 4, "aux_hidden_states"), 4, Chooser()
    )
    assert set(proposed.token_ids[0].tolist()) <= set(ids.tolist())
    reduced.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert torch.equal(again.draft_token_ids, ids)
    assert again.config.draft_vocab_size == 30


def test_reduced_vocabulary_is_right_where_the_verifiers_token_is_drafted(reduced, batch):
    """Against the verifier's best token of all; as likely to be wrong where it is outside."""
    tokens, _, metrics = reduced(batch)
    targets = reduced.verifier_head(batch.last_hidden_states)[0].argmax(-1)
    rows = (tokens[0, 0] >= 0).nonzero().flatten()
    proposed = reduced.draft_token_ids[tokens[0, 0, rows]]
    right = (proposed == targets[rows + 1]).float().mean()
    assert metrics["full_acc_0"].item() == pytest.approx(right.item())


@pytest.mark.parametrize("loss", ["kl_div", "tv"])
def test_rows_outside_a_reduced_vocabulary_count_as_wrong_and_teach_nothing(loss):
    model, document = lively("reduced"), make_document(60)
    ids = model.draft_token_ids
    (hidden,) = model.unroll(document, 1)
    logits = model.lm_head(hidden)[0]  # row i reads token i + 1
    verifier = model.verifier_head(document.last_hidden_states)[0, 1:]
    best = verifier.argmax(-1)
    covered = torch.isin(best, ids)
    assert 0.2 < covered.float().mean() < 0.9
    expected = LOSSES[loss](logits, verifier[:, ids])[covered].mean()
    _, found, metrics = model(document, Eagle3Objective(ttt_steps=1, loss={loss: 1.0}))
    assert_close(found, expected)
    assert_close(gradient(model, found), gradient(model, expected), 1e-4)
    right = (ids[logits.argmax(-1)] == best).float()
    assert metrics["full_acc_0"].item() == pytest.approx(right.mean().item())
    assert right[~covered].sum() == 0


def test_row_of_nothing_covered_teaches_nothing():
    model, document = lively("reduced"), make_document(8)
    head = model.verifier_head(document.last_hidden_states)[0]
    uncovered = ~torch.isin(head.argmax(-1), model.draft_token_ids)
    loss_mask = uncovered[None] & document.loss_mask
    # Row i is of token i + 1, whose distribution is the target.
    _, loss, _ = model(
        dataclasses.replace(document, loss_mask=loss_mask), Eagle3Objective(ttt_steps=1)
    )
    assert uncovered.any() and loss.item() == 0.0
    assert gradient(model, loss).abs().max() == 0.0


@pytest.mark.parametrize("variant", ["qwen3", "reduced"])
def test_sampled_proposals_say_what_they_were_drawn_from(variant):
    model, document = lively(variant), make_document(10)
    recorder = Recorder(temperature=0.7, generator=torch.Generator().manual_seed(0))
    proposal = model.propose(
        model.start_drafting(), confirm(document, 0, 6, "aux_hidden_states"), 3, recorder
    )
    assert proposal.probs is not None and proposal.probs.shape == (1, 3, 96)
    ids = torch.arange(96) if model.draft_token_ids is None else model.draft_token_ids
    expected = torch.zeros(1, 3, 96)
    expected[:, :, ids] = (recorder.logits / 0.7).softmax(-1)
    assert_close(proposal.probs, expected)
    assert (proposal.probs.gather(-1, proposal.token_ids[..., None]) > 0).all()


def test_draft_vocabulary_without_its_map_is_refused(reduced, tmp_path):
    reduced.save_pretrained(tmp_path)
    change_tensor(tmp_path, "d2t", lambda t: None)
    with pytest.raises(SpeculatorError, match="tensor d2t .* is missing"):
        SpeculatorModel.from_pretrained(tmp_path)


def test_t2d_is_made_from_d2t(reduced, tmp_path):
    reduced.save_pretrained(tmp_path)
    change_tensor(tmp_path, "t2d", lambda t: None)
    assert torch.equal(SpeculatorModel.from_pretrained(tmp_path).t2d, reduced.t2d)


def test_head_of_a_reduced_vocabulary_must_be_there(reduced, tmp_path):
    reduced.save_pretrained(tmp_path)
    change_tensor(tmp_path, "lm_head.weight", lambda t: None)
    with pytest.raises(SpeculatorError, match="lm_head.weight .* is missing"):
        SpeculatorModel.from_pretrained(tmp_path)


def test_d2t_off_by_one_is_refused(reduced, tmp_path):
    reduced.save_pretrained(tmp_path)
    change_tensor(tmp_path, "d2t", lambda t: t + 1)
    with pytest.raises(SpeculatorError, match="contradict"):
        SpeculatorModel.from_pretrained(tmp_path)


# ---- the verifier beside the draft ----


def test_state_never_holds_the_verifier(verifier, tmp_path):
    model = make_eagle3(verifier)
    model.attach_verifier(verifier, "full")
    names = set(model.state_dict())
    assert not any("verifier" in name for name in names)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names
    model.detach_verifier()
    with pytest.raises(SpeculatorError, match="no verifier is attached"):
        _ = model.verifier_head


def test_missing_ends_are_read_from_the_verifier(eagle3_folder):
    whole = SpeculatorModel.from_pretrained(eagle3_folder)
    for name in whole.from_verifier:
        change_tensor(eagle3_folder, name, lambda t: None)
    filled = SpeculatorModel.from_pretrained(eagle3_folder)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, filled.state_dict()[name]), name


@pytest.mark.parametrize("mode", ["full", "train_only"])
def test_attachment_modes(eagle3_folder, verifier_folder, batch, mode):
    model = SpeculatorModel.from_pretrained(
        eagle3_folder, verifier=verifier_folder, verifier_attachment_mode=mode
    )
    assert model(batch)[1].item() > 0
    if mode == "train_only":
        with pytest.raises(SpeculatorError, match="attached in full"):
            _ = model.verifier


def test_dtype_is_the_checkpoints_unless_given(eagle3_folder, tmp_path):
    half = SpeculatorModel.from_pretrained(eagle3_folder, dtype="bfloat16")
    half.save_pretrained(tmp_path)
    assert SpeculatorModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert SpeculatorModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(SpeculatorError, match="not a floating-point dtype"):
        SpeculatorModel.from_pretrained(tmp_path, dtype="int8")


def test_draft_made_without_its_verifier_takes_its_ends_when_attached(verifier):
    model = Eagle3DraftModel.from_training_args(verifier.config, aux_layer_ids=(1, 2, 3))
    assert not torch.equal(model.lm_head.weight, verifier.lm_head.weight)
    model.attach_verifier(verifier)
    assert torch.equal(model.lm_head.weight, verifier.lm_head.weight)
    assert torch.equal(model.embed_tokens.weight, verifier.model.embed_tokens.weight)


def test_checkpoint_without_layer_ids_reads_the_papers(tmp_path):
    deep = make_verifier(num_hidden_layers=8)
    model = make_eagle3(deep, aux_layer_ids=None, name_or_path="none")
    model.config.eagle_aux_hidden_state_layer_ids = None
    model.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path, verifier=deep)
    assert again.config.aux_layer_ids == [2, 4, 5]
    assert again.config.to_dict()["eagle_aux_hidden_state_layer_ids"] is None


@pytest.mark.parametrize("layer_type", ["llama", "qwen3"])
def test_sliding_window_is_written_and_read(verifier, tmp_path, layer_type):
    make_eagle3(
        verifier, layer_type=layer_type, sliding_window=5, name_or_path="none"
    ).save_pretrained(tmp_path)
    layer_config = SpeculatorModel.from_pretrained(tmp_path).config.transformer_layer_config
    assert (layer_config.sliding_window, layer_config.layer_types) == (5, ["sliding_attention"])


def test_number_of_aux_layers_is_written_for_vllm(verifier):
    written = make_eagle3(verifier, aux_layer_ids=(1, 4)).config.to_dict()
    assert written["transformer_layer_config"]["num_aux_hidden_states"] == 2


def test_unknown_attachment_mode_is_refused(verifier):
    with pytest.raises(ValueError, match="is 'ful', expected 'full' or 'train_only'"):
        make_eagle3(verifier).attach_verifier(verifier, "ful")


def test_given_tensors_are_checked_like_stored_ones(eagle3_folder):
    tensors = SpeculatorModel.from_pretrained(eagle3_folder).state_dict()
    again = SpeculatorModel.from_pretrained(eagle3_folder, state_dict=tensors)
    assert torch.equal(again.fc.weight, tensors["fc.weight"])
    tensors.pop("fc.weight")
    with pytest.raises(SpeculatorError, match="state_dict: tensor fc.weight .* is missing"):
        SpeculatorModel.from_pretrained(eagle3_folder, state_dict=tensors)


# ---- arguments ----


def test_default_aux_layers_are_the_papers():
    assert default_aux_layer_ids(32) == [2, 16, 29]
    with pytest.raises(SpeculatorError, match="too shallow"):
        default_aux_layer_ids(4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_layer": 2}, "num_layer"),
        ({"num_layers": 0}, "num_layers"),
        ({"layer_type": "gemma"}, "layer_type"),
        ({"norm_before_fc": True, "fc_norm": True}, "exclude each other"),
        ({"aux_layer_ids": (3, 1)}, "ascending"),
    ],
)
def test_bad_training_argument_is_named(verifier, kwargs, message):
    with pytest.raises(SpeculatorError, match=message):
        make_eagle3(verifier, **kwargs)


def test_half_a_vocabulary_map_is_refused(verifier):
    t2d, _ = choose_draft_vocabulary({}, 30, 96)
    with pytest.raises(SpeculatorError, match="Pass t2d and d2t together"):
        Eagle3DraftModel.from_training_args(verifier.config, t2d, aux_layer_ids=(1, 2, 3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ttt_steps": 0}, "ttt_steps"),
        ({"loss": "l2"}, "unknown loss 'l2'; expected one of kl_div"),
        ({"loss": {}}, "loss"),
        ({"steps": 2}, "steps"),
    ],
)
def test_bad_objective_is_named(kwargs, message):
    with pytest.raises(SpeculatorError, match=message):
        Eagle3DraftModel.get_trainer_kwargs(**kwargs)


def test_what_cannot_train_is_refused():
    with pytest.raises(SpeculatorError, match="is not a speculator"):
        SpeculatorModel.verify_training_compatible(make_verifier(num_hidden_layers=1))
    model = make_eagle3(make_verifier())
    model.requires_grad_(False)
    with pytest.raises(SpeculatorError, match="no weight that requires a gradient"):
        SpeculatorModel.verify_training_compatible(model)


def test_maps_over_the_whole_vocabulary_change_nothing(verifier):
    t2d, d2t = choose_draft_vocabulary({}, 96, 96)
    model = Eagle3DraftModel.from_training_args(
        verifier.config, t2d, d2t, verifier=verifier, aux_layer_ids=(1, 2, 3)
    )
    assert model.draft_token_ids is None and "t2d" not in model.state_dict()


def test_maps_of_another_vocabulary_are_refused(verifier):
    t2d, d2t = choose_draft_vocabulary({}, 20, 90)
    with pytest.raises(SpeculatorError, match="t2d has 90 entries; expected one for each of the"):
        Eagle3DraftModel.from_training_args(verifier.config, t2d, d2t, aux_layer_ids=(1, 2, 3))
