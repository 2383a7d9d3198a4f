"""A run that was stopped goes on bit for bit, however many processes there were and are."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PretrainedConfig, PreTrainedModel

from speculators_core.errors import SpeculatorError
from speculators_core.format.vocabulary import d2t_from_t2d
from speculators_core.training.optimizers import MuonAdamW
from speculators_core.training.states.state import (
    read_state,
    read_weights,
    restore_rng,
    write_state,
)
from speculators_core.training.states.state_folder import (
    FILES,
    OPTIMIZER,
    OPTIMIZER_GROUPS,
    RNG,
    SCHEDULER,
    TRAINER_STATE,
    WEIGHTS,
)
from tests.conftest import VOCAB_SIZE, make_batch, make_eagle3
from tests.data_generation.processes import processes

STATE = json.dumps({"global_step": 2, "log_history": [{"loss": 0.1 + 0.2}]})
CHECKED = hasattr(write_state, "__wrapped__")
"""Then beartype draws from Python's generator, to choose the items that it looks at. The processes
below are without it, and show that nothing else draws."""
VOCAB = 13  # odd, as all sizes here: two processes have unequal shares


class Tiny(PreTrainedModel):
    """Tied, frozen and idle weights, buffers of all kinds, and a draw in ``forward``."""

    config_class = PretrainedConfig

    def __init__(self):
        super().__init__(PretrainedConfig())
        self.embed_tokens = nn.Embedding(VOCAB, 7)
        self.inner = nn.Linear(7, 5)
        self.outer = nn.Linear(5, 7, bias=False)
        self.norm = nn.LayerNorm(7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.idle = nn.Parameter(torch.randn(3, 3))
        self.lm_head = nn.Linear(7, VOCAB, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("d2t", torch.randint(9, (VOCAB,)))
        self.register_buffer("t2d", torch.rand(VOCAB) > 0.5)
        self.register_buffer("derived", torch.randn(2), persistent=False)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        hidden = nn.functional.dropout(self.embed_tokens(ids), 0.2)
        hidden = self.frozen(hidden) + self.outer(self.inner(hidden).relu())
        return nn.functional.cross_entropy(self.lm_head(self.norm(hidden)), ids.roll(-1))


def adamw(model):
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=0.05)


OPTIMIZERS = {"adamw": adamw, "muon": lambda model: MuonAdamW(model, 0.05)}


def tiny_loss(model):
    """Draws from all generators."""
    ids = [random.randrange(VOCAB) for _ in range(6)] + np.random.randint(0, VOCAB, 3).tolist()
    return model(torch.tensor(ids)) * random.gauss(1, 0.1) * (1 + 0.1 * np.random.randn())


@dataclass
class Run:
    model: Any
    optimizer: Any
    scheduler: Any
    loss: Callable = tiny_loss

    def train(self, steps):
        for _ in range(steps):
            self.loss(self.model).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def write(self, folder, is_writer=True):
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        before = random.getstate()
        write_state(folder, **parts, trainer_state=STATE, is_writer=is_writer)
        if CHECKED:
            random.setstate(before)
        return folder

    def read(self, folder):
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return read_state(folder, **parts)


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_run(optimizer="adamw", seed=0, wrap=lambda model: model, make=Tiny, loss=tiny_loss):
    seed_all(seed)
    inside = make()
    model = wrap(inside)
    made = OPTIMIZERS[optimizer](inside)
    return Run(model, made, LambdaLR(made, lambda step: 1 / (1 + step)), loss)


def everything(run):
    """Weights, states and options, and what the generators draw next."""
    model = getattr(run.model, "module", run.model)
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for part in getattr(run.optimizer, "parts", [run.optimizer]):
        for number, entries in part.state_dict()["state"].items():
            found |= {f"{type(part)} {number} {k}": v.clone() for k, v in entries.items()}
    draws = random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3)
    groups = [sorted({**g, "params": len(g["params"])}.items()) for g in run.optimizer.param_groups]
    return found, str((draws, groups, run.scheduler.state_dict()))


def assert_equal(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert tensor.dtype == other[0][name].dtype
        same = tensor == other[0][name]
        assert (same.full_tensor() if isinstance(same, DTensor) else same).all(), name


def assert_goes_on(make, folder):
    """What was saved goes on as what saved it, in the middle of a pair of normal draws too."""
    run = make(seed=0)
    run.train(3)
    run.write(folder)
    run.train(2)
    expected = everything(run)
    again = make(seed=1)
    assert again.read(folder) == STATE
    assert restore_rng(folder, 0, 1)
    again.train(2)
    assert_equal(everything(again), expected)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoint-2"


# ---- one process ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stopped_run_goes_on_bit_for_bit(folder, optimizer):
    assert_goes_on(partial(make_run, optimizer), folder)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stopped_draft_goes_on_bit_for_bit(verifier, folder, optimizer):
    batch = make_batch(verifier)
    t2d = torch.arange(VOCAB_SIZE) % 3 > 0

    def make_draft():
        """Trained weights and maps of its own: all of it must come from the folder."""
        draft = make_eagle3(verifier, t2d=t2d, d2t=d2t_from_t2d(t2d))
        seed_all(torch.initial_seed() + len(made))
        for weight in draft.parameters():
            weight.data.add_(torch.randn(weight.shape) * 0.01 * len(made))
        made.append(draft)
        return draft

    made = []
    kwargs, _ = make_eagle3(verifier).get_trainer_kwargs(ttt_steps=2)
    loss = lambda model: model(batch, **kwargs)[1]  # noqa: E731  # a closure over the test's own
    assert_goes_on(partial(make_run, optimizer, make=make_draft, loss=loss), folder)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_saving_changes_nothing(folder, optimizer, steps):
    def end(saves):
        run = make_run(optimizer)
        run.train(steps)
        if saves:
            run.write(folder)
        run.train(2)
        return everything(run)

    assert_equal(end(saves=True), end(saves=False))


def test_a_state_before_the_first_step_has_no_optimizer_state(folder):
    make_run().write(folder)
    assert load_file(folder / OPTIMIZER) == {}
    again = make_run(seed=1)
    again.train(1)
    again.read(folder)
    assert not again.optimizer.state


def test_a_weight_without_gradient_has_no_state(folder):
    run = make_run("muon")
    run.train(2)
    run.write(folder)
    names = {name.rpartition("/")[0] for name in load_file(folder / OPTIMIZER)}
    trained = {name for name, weight in run.model.named_parameters() if weight.requires_grad}
    assert names == trained - {"idle"}
    again = make_run("muon", seed=1)
    again.read(folder)
    assert all(again.model.idle not in part.state for part in again.optimizer.parts)


def test_tied_weights_lie_there_once_and_buffers_that_follow_do_not(folder):
    make_run().write(folder)
    names = set(load_file(folder / WEIGHTS))
    assert names >= {"embed_tokens.weight", "frozen.weight", "idle", "d2t", "t2d"}
    assert not names & {"lm_head.weight", "derived"}


def test_a_scheduler_still_reaches_both_parts_after_reading(folder):
    make_run("muon").write(folder)
    run = make_run("muon", seed=1)
    run.read(folder)
    run.train(1)
    assert {g["lr"] for part in run.optimizer.parts for g in part.param_groups} == {0.025}


def test_what_accelerate_and_compile_wrap_is_saved_as_it_is_without(folder, tmp_path):
    run = make_run("muon")
    run.train(1)
    run.write(folder)
    wrapped = make_run("muon")
    wrapped.model.inner = torch.compile(wrapped.model.inner, backend="eager")
    accelerator = Accelerator(cpu=True)
    parts = wrapped.model, wrapped.optimizer, wrapped.scheduler
    wrapped = Run(*accelerator.prepare(*parts))
    wrapped.read(folder)
    wrapped.write(tmp_path / "again" / folder.name)
    assert_same_files(folder, tmp_path / "again" / folder.name, TRAINER_STATE, RNG)


def test_weights_can_be_read_alone(folder):
    run = make_run()
    run.train(2)
    run.write(folder)
    other = make_run(seed=1)
    before = everything(other)[1]
    read_weights(folder, other.model)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name])
    seed_all(1)
    make_run(seed=1)
    assert everything(other)[1] == before


def test_a_process_that_is_no_writer_writes_nothing(folder):
    make_run().write(folder, is_writer=False)
    assert not folder.parent.exists()


def test_every_file_is_safetensors_or_json(folder):
    make_run().write(folder)
    for name in FILES:
        if name.endswith(".safetensors"):
            load_file(folder / name)
        else:
            json.loads((folder / name).read_text())


def test_what_was_read_does_not_hang_on_the_files(folder):
    run = make_run()
    run.train(1)
    run.write(folder)
    again = make_run(seed=1)
    again.read(folder)
    for name in (WEIGHTS, OPTIMIZER):
        file = folder / name
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
    for one, other in zip(
        run.optimizer.state.values(), again.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(one[key], other[key]) for key in one)


# ---- what does not fit ----


def changed(change):
    def make():
        model = Tiny()
        change(model)
        return model

    return make


def wider(model):
    model.inner = nn.Linear(7, 6)


def halved(model):
    model.outer.half()


def without_norm(model):
    model.norm = nn.Identity()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wider, r"inner.bias is torch.float32 \[5\], expected torch.float32 \[6\]"),
        (halved, r"outer.weight is torch.float32 \[7, 5\], expected torch.float16 \[7, 5\]"),
        (without_norm, r"norm.bias is torch.float32 \[7\], expected absent"),
    ],
)
def test_a_state_of_another_model_is_refused(folder, change, said):
    make_run().write(folder)
    with pytest.raises(SpeculatorError, match=f"{WEIGHTS}: {said}.*choose another run.output"):
        make_run(make=changed(change)).read(folder)


def test_a_state_of_another_optimizer_is_refused(folder):
    make_run("muon").write(folder)
    with pytest.raises(SpeculatorError, match=f"{OPTIMIZER_GROUPS}: weight 0 in group 0 of AdamW"):
        make_run("adamw").read(folder)


def test_a_damaged_state_is_not_read(folder):
    run = make_run()
    run.write(folder)
    before = everything(run)[0]
    (folder / SCHEDULER).write_text("{}")
    with pytest.raises(SpeculatorError, match=f"{SCHEDULER} is damaged"):
        run.read(folder)
    assert_equal((before, ""), (everything(run)[0], ""))
    (folder / RNG).unlink()
    with pytest.raises(SpeculatorError, match=f"{RNG} is damaged: No such file"):
        restore_rng(folder, 0, 1)


def test_an_optimizer_of_other_weights_is_a_callers_mistake(folder):
    run = make_run()
    run.model = Tiny()
    with pytest.raises(ValueError, match="AdamW has 7 of 7 weights that are not the model's"):
        run.write(folder)


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(SpeculatorError, match="checkpoint-2 could not be written: .*Free some"):
        make_run().write(tmp_path / "run" / "checkpoint-2")


# ---- random states of another number of processes ----


def test_other_processes_draw_from_seeds_of_their_own(folder, caplog):
    make_run().write(folder)

    def draws(rank, world):
        assert not restore_rng(folder, rank, world)
        return str((random.random(), np.random.rand(), torch.rand(1)))

    of_two = [draws(rank, 2) for rank in (0, 1)]
    assert of_two == [draws(rank, 2) for rank in (0, 1)]
    assert len({*of_two, draws(0, 3)}) == 3
    assert "random states of 1 processes with numpy, python, torch; there are 2 now" in caplog.text


# ---- several processes ----


def ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp2(model):
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.inner, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def joined(rank, store, work, *arguments):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    work(rank, *arguments)
    dist.destroy_process_group()


def in_two_processes(store, work, *arguments):
    started = [
        processes.Process(target=joined, args=(rank, store, work, *arguments)) for rank in (0, 1)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=120)
    assert [process.exitcode for process in started] == [0, 0]


def train_apart(rank, wrap, optimizer, alone, folder):
    """Goes on from the state of one process, saves it again, trains, and goes on with that."""
    assert not CHECKED
    run = make_run(optimizer, seed=3, wrap=wrap)
    assert run.read(alone) == STATE
    assert not restore_rng(alone, rank, 2)
    run.write(folder.parent.with_name("same") / folder.name, is_writer=rank == 0)
    run.train(2)
    run.write(folder, is_writer=rank == 0)
    run.train(2)
    expected = everything(run)
    again = make_run(optimizer, seed=1, wrap=wrap)
    again.read(folder)
    assert restore_rng(folder, rank, 2)
    again.train(2)
    assert_equal(everything(again), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("wrap", [ddp, fsdp2])
def test_any_number_of_processes_reads_what_another_wrote(tmp_path, folder, wrap, optimizer):
    alone = tmp_path / "alone" / folder.name
    run = make_run(optimizer)
    run.train(2)
    run.write(alone)
    in_two_processes(tmp_path / "store", train_apart, wrap, optimizer, alone, folder)
    assert_same_files(alone, tmp_path / "same" / folder.name, RNG)
    rows = load_file(folder / RNG)["torch"]
    assert len(rows) == 2 and not torch.equal(rows[0], rows[1])
    run.read(folder)
    again = run.write(tmp_path / "again" / folder.name)
    assert_same_files(folder, again, RNG)
    whole = (folder / WEIGHTS).read_bytes()
    assert whole != (alone / WEIGHTS).read_bytes()


def fail_together(rank, folder):
    said = "Free some space" if rank == 0 else "see the process that writes"
    with pytest.raises(SpeculatorError, match=said):
        make_run(wrap=fsdp2).write(folder, is_writer=rank == 0)


def test_all_processes_hear_of_a_failure(tmp_path):
    (tmp_path / "run").write_text("a file")
    in_two_processes(tmp_path / "store", fail_together, tmp_path / "run" / "checkpoint-2")


def assert_same_files(one, other, *but):
    for name in FILES:
        if name not in but:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
