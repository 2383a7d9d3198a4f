import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.training.steps import StepsBenchmarkConfig, _memory_bytes, _prepare
from speculators_core.console import console
from speculators_core.errors import SpeculatorError
from speculators_core.format.vocabulary import choose_draft_vocabulary
from speculators_core.models.parts import attention
from speculators_core.training.budget import estimate as estimates
from speculators_core.training.budget import free_space, rehearsal
from speculators_core.training.budget.estimate import (
    Budget,
    Estimate,
    estimate,
    print_estimate,
    refuse,
)
from speculators_core.training.budget.free_space import DISK, MAIN_MEMORY
from speculators_core.training.budget.rehearsal import (
    measure_rate,
    rehearse,
    step_memory,
)
from speculators_core.training.device import compute_dtype
from speculators_core.training.optimizers import MuonAdamW
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.train import train
from tests.conftest import SMALL_RECIPES, VOCAB_SIZE, make_draft, make_verifier
from tests.training.making import plan_of as plan_of_run

CPU = torch.device("cpu")
MIB = 2**20
# Of an EAGLE-3 draft of one llama layer, width 32, MLP 64, 4 heads and 2 with keys of 8.
MATRICES = 96 * 32 + 64 * 32 + 2 * 64 * 16 + 32 * 32 + 3 * 32 * 64  # fc, q, k and v, o, MLP
VECTORS = 96 + 4 * 32  # norms of aux states, embedding, state, MLP's input and output
FROZEN = 2 * VOCAB_SIZE * 32  # embeddings and head


def plan_of(algorithm="eagle3", output="run", **sections) -> TrainingPlan:
    """A run that decodes nothing and holds out nothing; ``sections`` are options by section."""
    plan = {
        "model": {"algorithm": algorithm, "verifier": "verifier"},
        "data": {"store": "states", "row_length": 300, "eval_examples": 0},
        "evaluation": {"decode": False},
        "run": {"output": str(output)},
    }
    names = {*plan, *sections}
    return TrainingPlan.read({n: plan.get(n, {}) | sections.get(n, {}) for n in names}, "test")


def small(algorithm="eagle3", **options):
    return make_draft(algorithm, make_verifier(), **options)


def parts_of(plan, draft=None, place=MAIN_MEMORY, **options) -> dict[str, int]:
    found = estimate(plan, draft or small(), num_steps=10, is_timed=False, **options)
    return next(b for b in found.budgets if b.place.startswith(place)).parts


# ---- what is counted by hand ----


def test_weights_gradients_and_optimizer_by_hand():
    found = estimate(plan_of(), small(), num_steps=10, is_timed=False)
    assert found.trained_parameters == MATRICES + VECTORS
    assert found.frozen_parameters == FROZEN
    parts = found.budgets[0].parts
    assert parts["weights"] == 4 * (MATRICES + VECTORS + FROZEN)
    assert parts["gradients"] == 4 * (MATRICES + VECTORS)
    assert parts["optimizer"] == 4 * (MATRICES + 2 * VECTORS)
    assert parts["row"] == 300 * (4 * 32 * 4 + 25)
    assert parts["copy to save"] == parts["weights"] + parts["optimizer"]


def test_adamw_keeps_two_of_each_weight():
    parts = parts_of(plan_of(optimizer={"name": "adamw"}))
    assert parts["optimizer"] == 8 * (MATRICES + VECTORS)


@pytest.mark.parametrize("name", SMALL_RECIPES)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizer_states_are_those_that_it_has(name, optimizer):
    draft = small(name)
    made = MuonAdamW(draft, 1e-3) if optimizer == "muon" else torch.optim.AdamW(draft.parameters())
    for weight in draft.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    made.step()
    states = [state for part in getattr(made, "parts", [made]) for state in part.state.values()]
    tensors = [t for state in states for t in state.values() if torch.is_tensor(t) and t.ndim]
    parts = parts_of(plan_of(name, optimizer={"name": optimizer}), draft)
    assert parts["optimizer"] == sum(tensor.nbytes for tensor in tensors)


def test_a_reduced_vocabulary_counts_with_its_maps():
    t2d, d2t = choose_draft_vocabulary({}, 40, VOCAB_SIZE)
    draft = make_draft("eagle3", make_verifier(), t2d=t2d, d2t=d2t)
    frozen = (VOCAB_SIZE + 40) * 32
    assert parts_of(plan_of(), draft)["weights"] == (
        4 * (MATRICES + VECTORS + frozen) + 8 * 40 + VOCAB_SIZE
    )


def test_the_head_counts_alone_where_nothing_runs_the_verifier():
    draft = small()
    head = 4 * (2 * VOCAB_SIZE * 32 + 32)
    verifier = draft.verifier
    whole = sum(4 * tensor.numel() for tensor in (*verifier.parameters(), *verifier.buffers()))
    assert parts_of(plan_of(), draft)["verifier"] == head
    decoding = parts_of(plan_of(evaluation={"decode": True}), draft)
    assert decoding["verifier"] == whole > head
    texts = plan_of(data={"store": None, "texts": "data.yaml"})
    assert parts_of(texts, draft)["verifier"] == whole
    assert parts_of(plan_of(evaluation={"decode": True}), draft, verifier_bytes=7)["verifier"] == 7


BETWEEN = "between steps, beyond what one frees"


def test_evaluation_counts_beyond_what_a_step_frees():
    draft = small()
    alone = parts_of(plan_of(), draft)
    assert alone[BETWEEN] == parts_of(plan_of(evaluation={"decode": True}), draft)[BETWEEN] == 0
    few, many = (
        parts_of(plan_of(evaluation={"decode": True, "max_tokens": count}), draft)[BETWEEN]
        for count in (50_000, 60_000)
    )
    # Four prompts; keys and values of 2 heads of 8 in 4 layers.
    assert many - few == 4 * 10_000 * 2 * 2 * 8 * 4 * 4
    prompts = 4 * 300 * 2 * 2 * 8 * 4 * 4
    assert few > 4 * 50_000 * 2 * 2 * 8 * 4 * 4 + prompts - alone["activations"]
    texts = plan_of(data={"store": None, "texts": "data.yaml", "row_length": 4000})
    stored = plan_of(data={"row_length": 4000})
    masks = 4000 * 4000 * (4 + 1)
    assert masks > 2 * parts_of(stored, draft)["row"]
    assert parts_of(texts, draft)[BETWEEN] >= masks - parts_of(texts, draft)["activations"]
    assert parts_of(stored, draft)[BETWEEN] == 0


def test_disk_holds_kept_best_and_half_written_states():
    state = 4 * (MATRICES + VECTORS + FROZEN) + 4 * (MATRICES + 2 * VECTORS)
    disk = parts_of(plan_of(run={"keep": 3}), place=DISK)
    assert disk["saved states"] == (3 + 1 + 1) * state
    assert disk["speculator"] == 2 * (MATRICES + VECTORS + FROZEN)
    long = parts_of(plan_of(run={"saved_dtype": "float32"}), place=DISK)
    assert long["speculator"] == 4 * (MATRICES + VECTORS + FROZEN)


def test_rows_read_ahead_and_examples_in_memory():
    row = 300 * (4 * 32 * 4 + 25)
    assert parts_of(plan_of())["rows read ahead"] == 2 * row
    assert parts_of(plan_of(data={"num_workers": 3}))["rows read ahead"] == 3 * 4 * row
    held_out = parts_of(plan_of(data={"eval_examples": 5}))["held-out examples and rows"]
    assert held_out == 2 * 5 * row
    known = parts_of(plan_of(data={"eval_examples": 5}), num_eval_tokens=60)
    assert known["held-out examples and rows"] == 2 * 60 * row // 300
    stream = plan_of(
        data={"store": None, "queue": "tcp://*:5555", "queue_size": 9}, run={"max_steps": 9}
    )
    assert parts_of(stream)["queue"] == 9 * row
    short = parts_of(plan_of(), stored_dtype=torch.bfloat16)
    assert short["rows read ahead"] == 2 * 300 * (4 * 32 * 2 + 25)
    assert short["row"] == 300 * (4 * 32 * (2 + 4) + 25)  # as stored, and in float32


def test_shards_share_weights_and_copies_send_gradients():
    alone = parts_of(plan_of())
    copies = parts_of(plan_of(), world_size=4)
    shards = parts_of(plan_of(run={"fsdp": True}), world_size=4)
    for part in ("weights", "gradients", "optimizer"):
        assert copies[part] == alone[part] and shards[part] == alone[part] // 4
    assert copies["gradients to send"] == alone["gradients"]
    wide = small(intermediate_size=9000)
    shards_of_wide = parts_of(plan_of(run={"fsdp": True}, data={"row_length": 16}), wide)
    freed = shards_of_wide["activations"] + shards_of_wide["gathered shards"]
    assert shards_of_wide[BETWEEN] == max(0, 2 * shards_of_wide["weights"] - freed)
    assert shards["gathered shards"] == alone["weights"] + 2 * alone["gradients"]
    assert shards["copy to save"] == alone["copy to save"]


# ---- what is rehearsed ----


def allocated_bytes(draft, plan, first_document) -> int:
    """What torch's allocator itself counted at most while a real step ran."""
    options, _ = draft.get_trainer_kwargs(**plan.model.objective)
    with rehearsal._as_trained(draft, plan, CPU):
        row = rehearsal._make_row(
            draft, compute_dtype(plan, CPU), plan.data.row_length, first_document, CPU
        )
        for weight in draft.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        torch.manual_seed(plan.run.seed)  # as a rehearsal does
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            with rehearsal._precision(row.aux_hidden_states.dtype, CPU):
                _, loss, _ = draft(row, **options)
            loss.backward()
            del loss, _
    draft.zero_grad()
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


CASES = [
    ("eagle3", {}, {}, {}),
    ("eagle3", {"ttt_steps": 5, "loss": {"tv": 1.0, "jsd": 0.5}}, {"sliding_window": 40}, {}),
    ("eagle3", {}, {"fc_norm": True, "norm_before_fc": False}, {"gradient_checkpointing": True}),
    ("peagle", {"max_anchors": None}, {"layer_type": "qwen3"}, {}),
    ("peagle", {}, {"num_layers": 2}, {"dtype": "bfloat16"}),
    ("dflash", {}, {}, {}),
    ("dflash", {"loss": "ce", "position_weights": "dpace"}, {}, {"gradient_checkpointing": True}),
    ("dflash", {"max_anchors": 30}, {"causal": True}, {"dtype": "bfloat16"}),
    ("mtp", {}, {}, {}),
    ("mtp", {"targets": "text", "attention": "independent"}, {}, {"dtype": "bfloat16"}),
    ("mtp", {"num_steps": 2}, {}, {"gradient_checkpointing": True}),
]


@pytest.mark.parametrize(("algorithm", "objective", "recipe", "run"), CASES)
@pytest.mark.parametrize("first_document", [300, 120])
def test_a_rehearsal_counts_what_the_allocator_counts(
    algorithm, objective, recipe, run, first_document
):
    draft = small(algorithm, **recipe)
    plan = plan_of(algorithm, model={"objective": objective}, run=run)
    counted = rehearse(draft, plan, CPU, first_document).tensor_bytes
    assert counted == pytest.approx(allocated_bytes(draft, plan, first_document), rel=0.03)


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash"])
def test_a_reduced_vocabulary_is_rehearsed(algorithm):
    t2d, d2t = choose_draft_vocabulary({}, 40, VOCAB_SIZE)
    draft = make_draft(algorithm, make_verifier(), t2d=t2d, d2t=d2t)
    counted = rehearse(draft, plan_of(algorithm), CPU, 300).tensor_bytes
    assert counted == pytest.approx(allocated_bytes(draft, plan_of(algorithm), 300), rel=0.03)


@pytest.mark.parametrize("algorithm", SMALL_RECIPES)
def test_a_draft_without_memory_is_rehearsed_alike(algorithm):
    real = rehearse(small(algorithm), plan_of(algorithm), CPU, 300)
    with torch.device("meta"):
        without = small(algorithm)
    assert without.device.type == "meta"
    assert rehearse(without, plan_of(algorithm), CPU, 300) == real
    found = estimate(plan_of(algorithm), without, num_steps=10)
    assert found.rate_tokens_per_s is None and found.seconds is None
    assert found.budgets[0].parts == parts_of(plan_of(algorithm), small(algorithm))


def test_what_is_freed_is_not_counted():
    counted = rehearsal.Rehearsal(CPU)
    source = counted.stand_in(torch.empty(1000))
    with counted:
        kept = source + 1
        (source * 2).sum()  # at most 4000 more at one time, and the sum
        view = kept[10:]
    assert counted.peak_bytes == 4000 + 4000 + 4
    assert counted.live_bytes == 4000
    del kept
    assert counted.live_bytes == 4000
    del view
    assert counted.live_bytes == 0


def test_masks_decide_on_shapes_and_real_tensors_keep_what_they_had():
    counted = rehearsal.Rehearsal(CPU)
    source = counted.stand_in(torch.empty(4, 3))
    mask, choice = torch.tensor([True, False, True, True]), torch.zeros(4, dtype=torch.long)
    with counted:
        assert source[mask].shape == (3, 3)
        choice[:] = source.argmax(-1)
        source[mask] = 1.0
        assert float(source.sum()) == 1.0
    assert choice.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("algorithm", SMALL_RECIPES)
def test_no_documents_in_a_row_hold_more(algorithm, monkeypatch):
    """Scores that are kept need more than those that are computed twice, so it is not the row of
    one document that holds the most."""
    monkeypatch.setattr(attention, "RECOMPUTE_SCORES", 2**18)
    monkeypatch.setattr(attention, "_attend_fused", attention._attend_plainly)
    plan = plan_of(algorithm, data={"row_length": 900})
    draft = small(algorithm)
    most = step_memory(draft, plan, CPU)
    each = {first: rehearse(draft, plan, CPU, first) for first in (256, 400, 500, 600, 700, 900)}
    assert each[900].has_recomputed
    assert most.size_bytes >= max(memory.size_bytes for memory in each.values())
    assert most.size_bytes <= 1.5 * max(memory.size_bytes for memory in each.values())


def test_a_rehearsal_leaves_no_trace():
    draft = small("peagle")
    draft.eval()
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plan = plan_of("peagle")
    first = rehearse(draft, plan, CPU, 300)
    recomputing = plan_of("peagle", run={"gradient_checkpointing": True})
    assert rehearse(draft, recomputing, CPU, 300).tensor_bytes < first.tensor_bytes
    assert rehearse(draft, plan, CPU, 300) == first
    assert torch.equal(torch.rand(3), expected)
    assert not draft.training and not draft.is_gradient_checkpointing
    assert all(weight.grad is None for weight in draft.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())
    assert type(draft.fc.weight) is torch.nn.Parameter


def test_options_change_what_a_step_holds():
    draft = small("dflash", num_layers=3)
    whole = parts_of(plan_of("dflash"), draft)["activations"]
    assert parts_of(plan_of("dflash", data={"row_length": 150}), draft)["activations"] < whole
    objective = {"model": {"objective": {"max_anchors": 20}}}
    assert parts_of(plan_of("dflash", **objective), draft)["activations"] < whole
    recomputed = plan_of("dflash", run={"gradient_checkpointing": True})
    assert parts_of(recomputed, draft)["activations"] < whole


def test_a_draft_that_cannot_be_rehearsed_is_counted_without(monkeypatch, caplog):
    draft = small()

    def forward(batch, **_):
        batch.aux_hidden_states.nonzero()

    monkeypatch.setattr(draft, "forward", forward)
    parts = parts_of(plan_of(), draft)
    assert "did not count activations of Eagle3DraftModel" in caplog.text
    assert parts["activations"] < parts["libraries"] and parts["weights"] > 0


def test_a_draft_needs_its_verifier():
    draft = small()
    draft.detach_verifier()
    with pytest.raises(SpeculatorError, match="no verifier is attached"):
        estimate(plan_of(), draft, num_steps=1)


# ---- what is measured ----

MEASURED_OBJECTIVES = {
    "eagle3": {"ttt_steps": 3},
    "peagle": {"num_depths": 4, "max_anchors": None},
    "dflash": {"max_anchors": 128},
    "mtp": {"num_steps": 3},
}


def _measure(algorithm: str, length: int, width: int) -> tuple[int, int]:
    """By how much memory grew in four steps over rows of one and two documents, and the sum of what
    was not there before: all but weights, verifier and a row."""
    torch.manual_seed(0)
    settings = StepsBenchmarkConfig(hidden_size=width)
    draft, row, options = _prepare(settings, algorithm, length, CPU, torch.float32)
    before = _memory_bytes(CPU, peak=False)
    optimizer = MuonAdamW(draft, 1e-3)
    for step in range(4):
        documents = (torch.arange(length) >= 0.9 * length).long()[None] * (step % 2)
        _, loss, _ = draft(replace(row, document_ids=documents), **options)
        loss.backward()
        optimizer.step()
        draft.zero_grad()
    states = [state for part in optimizer.parts for state in part.state.values()]
    copies = [t.clone() for state in states for t in state.values() if torch.is_tensor(t)]
    copies += [tensor.clone() for tensor in draft.state_dict().values()]
    grown = _memory_bytes(CPU, peak=True) - before
    objective = {"objective": MEASURED_OBJECTIVES[algorithm]}
    plan = plan_of(algorithm, model=objective, data={"row_length": length})
    parts = parts_of(plan, draft)
    here = ("weights", "verifier", "row")
    return grown, sum(size for part, size in parts.items() if part not in here)


@pytest.mark.parametrize("algorithm", MEASURED_OBJECTIVES)
def test_memory_grows_to_less_than_the_sum_and_to_half_of_it(algorithm):
    call = f"_measure({algorithm!r}, 1024, 128)"
    code = f"from tests.training.budget.test_estimate import _measure; print(*{call})"
    # An allocator follows environment variables, which other tests may have left.
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    )
    grown, estimated = map(int, done.stdout.split()[-2:])
    assert 0.4 * estimated < grown < estimated, (grown / MIB, estimated / MIB)


# ---- time ----


def test_steps_and_rate_give_the_time():
    plan = plan_of(optimizer={"rows_per_step": 3})
    found = estimate(plan, small(), num_steps=50, num_rows=7, num_tokens=9, rate_tokens_per_s=450.0)
    assert found.seconds == pytest.approx(50 * 3 * 300 / 450)
    assert (found.num_steps, found.num_rows, found.num_tokens) == (50, 7, 9)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_timed_steps_leave_the_draft_as_it_was(optimizer):
    draft = small("dflash").eval()
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plan = plan_of("dflash", optimizer={"name": optimizer})
    assert measure_rate(draft, plan, CPU) > 0
    assert torch.equal(torch.rand(3), expected)
    assert not draft.training and all(weight.grad is None for weight in draft.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())


@pytest.mark.parametrize(
    ("exponent", "slow", "expected", "timed"),
    [
        (1.0, 1e-4, 1.6384, [1024, 2048, 4096, 8192, 16384]),
        (2.0, 1e-7, 26.8435456, [1024, 2048, 4096]),
        (1.0, 1.0, 16384.0, [1024]),
    ],
)
def test_a_long_row_is_timed_as_far_as_time_allows(exponent, slow, expected, timed):
    asked = []

    def time_steps(length):
        asked.append(length)
        return slow * length**exponent

    assert rehearsal._time_row(time_steps, 16384) == pytest.approx(expected)
    assert asked == timed
    assert rehearsal._time_row(lambda length: float(length), 1500) == 1500.0


def test_a_run_that_begins_times_nothing(given, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "measure_rate", pytest.fail)
    changes = {"evaluation": {"decode": False, "roll_outs": 0}, "run": {"max_steps": 1}}
    assert train(plan_of_run(given, tmp_path / "run", **changes)).steps == 1


def test_the_rate_is_measured_where_none_is_given():
    found = estimate(plan_of(), small(), num_steps=10)
    assert found.rate_tokens_per_s is not None and found.rate_tokens_per_s > 0
    assert found.seconds == pytest.approx(10 * 300 / found.rate_tokens_per_s)
    assert estimate(plan_of(), small(), num_steps=10, is_timed=False).seconds is None


def test_a_run_that_does_not_fit_is_not_timed(monkeypatch):
    monkeypatch.setattr(free_space, "free_main_memory_bytes", lambda: 0)
    monkeypatch.setattr(estimates, "measure_rate", pytest.fail)
    assert estimate(plan_of(), small(), num_steps=10).rate_tokens_per_s is None


# ---- what does not fit ----


def refusal(budget: Budget) -> str:
    found = Estimate(
        budgets=(budget,),
        trained_parameters=1,
        frozen_parameters=1,
        num_steps=1,
        num_rows=None,
        num_tokens=None,
        rate_tokens_per_s=None,
        seconds=None,
    )
    with pytest.raises(SpeculatorError) as error:
        refuse(found)
    return str(error.value)


def test_a_refusal_names_part_sizes_and_the_best_option():
    budget = Budget(
        place="cuda:0",
        parts={"weights": 2**30, "activations": 5 * 2**30},
        available_bytes=3 * 2**29,
        savings={"data.row_length to 1024": 2**31, "run.fsdp to true": 2**20},
    )
    assert refusal(budget) == (
        "the run needs 6.0 GiB of cuda:0; 1.5 GiB are available. activations takes 5.0 GiB. "
        "Set data.row_length to 1024, which saves 2.0 GiB."
    )
    without = refusal(budget.model_copy(update={"savings": {}}))
    assert without.endswith("Free some, or use a place that has more.")


def test_what_fits_is_not_refused():
    refuse(estimate(plan_of(), small(), num_steps=1, is_timed=False))


def short_of(monkeypatch, plan, draft=None, **options) -> Budget:
    """The budget of main memory where there is none."""
    monkeypatch.setattr(free_space, "free_main_memory_bytes", lambda: -(2**40))
    found = estimate(plan, draft or small(), num_steps=10, **options)
    with pytest.raises(SpeculatorError, match=f"of {MAIN_MEMORY}"):
        refuse(found)
    return found.budgets[0]


def test_an_option_saves_what_a_plan_with_it_needs_less(monkeypatch):
    draft = small()
    plan = plan_of(evaluation={"decode": True}, data={"num_workers": 4})
    needed = sum(parts_of(plan, draft, world_size=2).values())
    savings = short_of(monkeypatch, plan, draft, world_size=2).savings
    monkeypatch.undo()
    for option, changed in {
        "data.row_length to 150": {"data": {"row_length": 150, "num_workers": 4}},
        "data.num_workers to 2": {"data": {"num_workers": 2}},
        "run.gradient_checkpointing to true": {"run": {"gradient_checkpointing": True}},
        "evaluation.decode to false": {"evaluation": {"decode": False}},
    }.items():
        sections = {"evaluation": {"decode": True}, "data": {"num_workers": 4}} | changed
        other = plan_of(**sections)
        less = needed - sum(parts_of(other, draft, world_size=2).values())
        assert savings[option] == less > 0
    assert "run.keep to 1" not in savings and "data.queue_size to 32" not in savings


def test_shards_help_where_there_are_several_processes(monkeypatch):
    draft = small(intermediate_size=2000)
    plan = plan_of(data={"row_length": 16}, optimizer={"name": "adamw"})
    assert "run.fsdp to true" not in short_of(monkeypatch, plan, draft).savings
    assert short_of(monkeypatch, plan, draft, world_size=64).savings["run.fsdp to true"] > 0


def test_patience_needs_decoding(monkeypatch):
    plan = plan_of(evaluation={"decode": True, "patience": 2})
    assert "evaluation.decode to false" not in short_of(monkeypatch, plan).savings


def test_a_full_disk_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(free_space, "free_disk_bytes", lambda folder: 1000)
    found = estimate(plan_of(output=tmp_path), small(), num_steps=10, is_timed=False)
    with pytest.raises(SpeculatorError) as error:
        refuse(found)
    assert f"of disk of {tmp_path}; 0.0 MiB are available. saved states takes" in str(error.value)
    assert "Set run.keep to 1, which saves" in str(error.value)


# ---- what there is ----


def test_what_the_run_holds_already_is_available(monkeypatch, tmp_path):
    monkeypatch.setattr(free_space, "free_main_memory_bytes", lambda: 10**9)
    monkeypatch.setattr(free_space, "free_disk_bytes", lambda folder: 10**6)
    draft = small()
    held = 4 * (MATRICES + VECTORS + FROZEN)
    held += sum(4 * weight.numel() for weight in draft.verifier.parameters())
    found = free_space.available_bytes(MAIN_MEMORY, draft, tmp_path)
    assert 10**9 + held <= found <= 10**9 + held + 4096  # and rotary tables
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_space.available_bytes(MAIN_MEMORY, draft, tmp_path) == found - 3 * 10**9 // 4
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "weights.safetensors").write_bytes(b"x" * 500)
    assert free_space.available_bytes(f"{DISK}run", draft, tmp_path) == 10**6 + 500


def test_a_folder_that_is_not_there_yet_is_on_its_parents_disk(tmp_path):
    expected = os.statvfs(tmp_path)
    found = free_space.free_disk_bytes(tmp_path / "not" / "yet")
    assert found == pytest.approx(expected.f_bavail * expected.f_frsize, rel=0.05)


def test_free_memory_is_within_the_machine():
    assert 0 < free_space.free_main_memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * 4096 * 16


def group(folder, cache="inactive_file", **files):
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache} 30\n")


def test_limits_of_control_groups_and_their_parents(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    group(tmp_path / "v2/job", memory__max=1000, memory__current=400)
    group(tmp_path / "v2/job/step", memory__max="max", memory__current=300)
    assert free_space._free_in_groups(own, tmp_path / "v2") == [1000 - 400 + 30]
    own.write_text("3:cpu:/\n4:memory:/job\n0::/\n")
    files = {"memory__limit_in_bytes": 900, "memory__usage_in_bytes": 800}
    group(tmp_path / "v1/memory/job", cache="total_inactive_file", **files)
    assert free_space._free_in_groups(own, tmp_path / "v1") == [900 - 800 + 30]
    assert free_space._free_in_groups(tmp_path / "none", tmp_path) == []


def test_a_groups_limit_is_heeded(monkeypatch):
    monkeypatch.setattr(free_space, "_free_in_groups", lambda: [123])
    assert free_space.free_main_memory_bytes() == 123


def test_bfloat16_is_for_a_gpu_unless_it_is_asked_for():
    assert compute_dtype(plan_of(), CPU) == torch.float32
    assert compute_dtype(plan_of(), torch.device("cuda")) == torch.bfloat16
    assert compute_dtype(plan_of(run={"dtype": "bfloat16"}), CPU) == torch.bfloat16
    assert compute_dtype(plan_of(run={"dtype": "float32"}), torch.device("cuda")) == torch.float32


# ---- what is shown ----


def test_the_table_shows_parts_sums_and_time():
    found = estimate(plan_of(), small(), num_steps=1234, num_rows=5678, rate_tokens_per_s=100.0)
    with console.capture() as shown:
        print_estimate(found)
    text = shown.get()
    for budget in found.budgets:
        for part, size in budget.parts.items():
            assert (part in text) == (size > 0), part
        assert f"{budget.needed_bytes / MIB:.1f} MiB" in text
    assert f"parameters: {MATRICES + VECTORS:,} trained, {FROZEN:,} frozen" in text
    assert "tokens: unknown, rows: 5,678, steps: 1,234" in text
    assert "time: 1:01:42 of steps, at 100 tokens/s in each process" in text


def test_a_time_that_was_not_measured_is_said_so():
    with console.capture() as shown:
        print_estimate(estimate(plan_of(), small(), num_steps=1, is_timed=False))
    assert "time: not measured" in shown.get()
