"""A training run in memory: data, draft and trainer; faults that a user can mend come first."""

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from speculators_core.batch import Batch
from speculators_core.data_generation.engines import schema_of
from speculators_core.data_generation.examples import Schema
from speculators_core.data_generation.packing import RowLayout
from speculators_core.errors import SpeculatorError
from speculators_core.model import SpeculatorModel, load_verifier
from speculators_core.provenance import sample_weights
from speculators_core.training.draft import CountTokens, draft_class, make_draft
from speculators_core.training.estimate import Estimate, estimate
from speculators_core.training.evaluation import HeldOut, choose_prompts, evaluate_truth
from speculators_core.training.online import (
    Generation,
    Received,
    TextExamples,
    read_generation_plan,
)
from speculators_core.training.optimizers import MuonAdamW, adamw
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.sharding import shard
from speculators_core.training.sources import Examples, Rows, Split, StoredExamples, Stream
from speculators_core.training.state import read_weights
from speculators_core.training.state_folder import newest_state
from speculators_core.training.trainer import SpeculatorTrainer
from speculators_core.training.watch import Display, LogFile, Schedule, StopOnSignal
from speculators_core.verifier import read_verifier_config
from speculators_core.vocabulary import check_tokenizer

LOG = "training_log.jsonl"

Source = Examples | Generation | Received


class Job:
    """Everything that a run needs; `open` makes it."""

    def __init__(self, plan: TrainingPlan, source: Source, draft: SpeculatorModel) -> None:
        self.plan = plan
        self.source = source
        self.draft = draft
        self.layout = RowLayout.of(source.schema, draft.aux_layer_ids, plan.data.row_length)
        self.stop = StopOnSignal()
        self.trainer: SpeculatorTrainer | None = None

    @classmethod
    @contextmanager
    def open(cls, plan: TrainingPlan) -> Iterator["Job"]:
        """Looks at options and data, then loads the verifier and makes the draft.

        Raises:
            SpeculatorError: plan, data and verifier do not fit together, or cannot be read.
        """
        draft_class(plan.model)
        _check_trackers(plan)
        if plan.run.fsdp and world_size() == 1:
            raise SpeculatorError(
                "run.fsdp shards over several processes, there is one: start it with `torchrun "
                "--nproc-per-node N -m speculators_core train ...`, or leave it out."
            )
        with ExitStack() as stack:
            stack.callback(_leave_group)
            source = _open_source(plan, stack)
            verifier = _load_verifier(plan, source)
            set_seed(plan.run.seed)
            draft = make_draft(plan.model, verifier, source.schema, _token_counter(plan, source))
            yield cls(plan, source, draft)

    # ---- rows ----

    @cached_property
    def split(self) -> Split | None:
        """Of examples that have numbers."""
        return _split(self.plan, self.source)

    @cached_property
    def rows(self) -> Rows | Stream:
        """What is trained on. Of a stream, the first examples are received here."""
        data = self.plan.data
        if isinstance(self.source, Generation | Received):
            return Stream(self.source.open, self.layout, data.eval_examples, data.limit)
        assert self.split is not None
        return Rows(self.source, self.split.train, self.layout)

    @cached_property
    def held_out(self) -> HeldOut:
        if isinstance(self.rows, Stream):
            return HeldOut(self.rows.held_out, self.source.schema)
        assert self.split is not None
        return HeldOut(self.rows.examples.read(self.split.held_out), self.source.schema)

    @property
    def eval_rows(self) -> list[Batch]:
        return [self.layout.pack(row) for row in self.layout.rows(self.held_out.examples)]

    @property
    def rows_per_step(self) -> int:
        """Of all ranks."""
        return self.plan.optimizer.rows_per_step * world_size()

    @property
    def num_steps(self) -> int:
        plan = self.plan
        if plan.run.max_steps is not None:
            return plan.run.max_steps
        assert isinstance(self.rows, Rows)
        return math.ceil(plan.run.epochs * math.ceil(len(self.rows) / self.rows_per_step))

    def estimate(self) -> Estimate:
        """What the run takes."""
        is_stream = isinstance(self.source, Generation | Received)  # it is not opened for this
        rows = None if is_stream else self.rows
        assert not isinstance(rows, Stream)
        return estimate(
            self.plan,
            self.draft,
            num_steps=self.num_steps,
            num_rows=None if rows is None else len(rows),
            num_tokens=None if rows is None else rows.num_tokens,
            world_size=world_size(),
            stored_dtype=self.source.schema.real_dtype,
        )

    # ---- the run ----

    def train(self) -> TrainerState:
        """Trains, from the newest saved state if there is one.

        Raises:
            SpeculatorError: a loss was not finite, or the data ended early.
        """
        plan, output = self.plan, self.plan.run.output
        display = Display(self.rows_per_step * plan.data.row_length)
        trainer = self.trainer = self.make_trainer()
        section = plan.evaluation
        schedule = Schedule(section.every, plan.run.save_every, section.patience, trainer.evaluate)
        for callback in (schedule, self.stop, LogFile(output / LOG), display):
            trainer.add_callback(callback)
        newest = newest_state(output)
        try:
            with self.stop.listening():
                trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        finally:
            display.close()
        state = trainer.state
        if state.global_step < self.num_steps and not (self.was_stopped or schedule.has_ended):
            raise SpeculatorError(
                f"data.{plan.data.kind} gave no row that trains after step {state.global_step} of "
                f"{self.num_steps}: more than the {plan.data.eval_examples} examples of "
                "data.eval_examples must have a token to learn."
            )
        return state

    def best_draft(self) -> SpeculatorModel:
        """The draft with the weights of its longest acceptance length, or the last ones.

        Every rank calls it.
        """
        assert self.trainer is not None
        state = self.trainer.state
        if state.best_global_step not in (None, state.global_step):
            read_weights(
                self.plan.run.output / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}",
                self.draft,
            )
        return self.trainer.whole_draft()

    @property
    def best_figures(self) -> dict[str, float]:
        """Of the evaluation of those weights."""
        assert self.trainer is not None
        state = self.trainer.state
        step = state.best_global_step or state.global_step
        found: dict[str, float] = {}
        for line in state.log_history:
            if line["step"] == step:
                found |= {name: v for name, v in line.items() if name.startswith("eval_")}
        return {name.removeprefix("eval_"): value for name, value in found.items()}

    @property
    def was_stopped(self) -> bool:
        """By SIGTERM, before its end."""
        return self.stop.has_stopped

    def make_trainer(self) -> SpeculatorTrainer:
        """The trainer without what `watch` adds to it."""
        plan, draft = self.plan, self.draft
        arguments = training_arguments(plan, self.num_steps)
        arguments._n_gpu = min(arguments.n_gpu, 1)  # a process trains on one; torchrun starts more
        if plan.run.compile:
            for name, module in draft.named_modules():
                if name.endswith(".mlp"):
                    module.compile(dynamic=True)  # steps of an unroll have rows of unlike lengths
        if plan.run.fsdp:
            dtype = torch.bfloat16 if arguments.bf16 else None
            shard(draft, arguments.device, dtype)
        rate, decay = plan.optimizer.learning_rate, plan.optimizer.weight_decay
        make = MuonAdamW if plan.optimizer.optimizer == "muon" else adamw
        train_kwargs, eval_kwargs = draft.get_trainer_kwargs(**plan.model.objective)
        return SpeculatorTrainer(
            draft,
            arguments,
            train_kwargs=train_kwargs,
            eval_kwargs=eval_kwargs,
            measure=self._measure,
            keep=plan.run.keep,
            train_dataset=self.rows,
            eval_dataset=self.eval_rows,
            optimizers=(make(draft, rate, decay), None),
        )

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids to decode at each evaluation.

        Raises:
            SpeculatorError: they cannot be read, or there are none.
        """
        plan = self.plan
        if not plan.evaluation.decode:
            return []
        longest = self.draft.verifier.config.get_text_config().max_position_embeddings
        examples = self.held_out.examples
        return choose_prompts(plan.evaluation, examples, plan.model.verifier, longest)

    def _measure(self, draft: SpeculatorModel) -> dict[str, float]:
        section, held_out = self.plan.evaluation, self.held_out
        with self.stop.interruptible():
            return evaluate_truth(draft, self.prompts, held_out, section, rank(), world_size())


# ---- options of Transformers' trainer ----


def training_arguments(plan: TrainingPlan, num_steps: int) -> TrainingArguments:
    """The plan in the trainer's words. Evaluation, saving and the end are `watch`'s."""
    run, optimizer, data = plan.run, plan.optimizer, plan.data
    schedules = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}
    floor = {"min_lr_rate": optimizer.final_share} if optimizer.schedule == "cosine" else None
    workers = data.num_workers if data.kind == "store" else 0
    return TrainingArguments(
        output_dir=str(run.output),
        max_steps=num_steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=optimizer.rows_per_step,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=schedules.get(optimizer.schedule, optimizer.schedule),
        lr_scheduler_kwargs=floor,
        warmup_steps=math.ceil(optimizer.warmup_share * num_steps),
        max_grad_norm=optimizer.max_grad_norm,
        bf16=uses_bfloat16(plan),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=run.gradient_checkpointing,
        seed=run.seed,
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,  # a loss that is not finite ends the run
        save_strategy="no",
        eval_strategy="no",
        report_to=list(run.trackers) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        # A fork of a process whose OpenMP threads have run would hang.
        dataloader_multiprocessing_context="spawn" if workers else None,
        ignore_data_skip=data.kind == "queue",  # it has moved on by itself
    )


def uses_bfloat16(plan: TrainingPlan) -> bool:
    """For the computation; weights and optimizer stay float32."""
    if plan.run.dtype == "auto":
        return torch.cuda.is_available()
    return plan.run.dtype == "bfloat16"


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_trackers(plan: TrainingPlan) -> None:
    for tracker in plan.run.trackers:
        if find_spec(tracker) is None:
            raise SpeculatorError(
                f"run.trackers: {tracker} is not installed: `pip install {tracker}`."
            )


# ---- data ----


def _open_source(plan: TrainingPlan, stack: ExitStack) -> Source:
    data, verifier = plan.data, plan.model.verifier
    if data.store is not None:
        stored = StoredExamples(data.store)
        check_data(stored.schema, stored.made_from.get("weights"), verifier, stored.name)
        return stored
    file = data.texts or data.online or data.queue
    assert file is not None
    generation = read_generation_plan(file, is_elsewhere=data.queue is not None)
    check_data(schema_of(generation), sample_weights(generation.data.verifier), verifier, str(file))
    if data.texts is not None:
        return TextExamples(generation)
    if data.online is not None:
        if world_size() > 1:
            raise SpeculatorError(
                f"data.online feeds one process, there are {world_size()}: start `speculators "
                "generate-data` by itself and train from data.queue, or from data.store."
            )
        source: Generation | Received = Generation(generation, data.queue_size)
    else:
        source = Received(generation, data.queue_size, rank(), world_size())
    stack.callback(source.close)
    return source


def check_data(schema: Schema, weights: str | None, verifier: str, where: str) -> None:
    """Holds data against the verifier that the draft is for; ``weights`` is a hash of theirs.

    Raises:
        SpeculatorError: they were made with a verifier of another shape, weights or tokenizer.
    """
    text = read_verifier_config(verifier).get_text_config()
    depth = schema.layer_ids[-1] if schema.has_last else text.num_hidden_layers
    for what, theirs, ours in (
        ("width", schema.hidden_size, text.hidden_size),
        ("vocabulary", schema.vocab_size, text.vocab_size),
        ("depth", depth, text.num_hidden_layers),
        ("weights", weights or "", sample_weights(verifier) or weights or ""),
    ):
        if theirs != ours:
            shown = "" if what == "weights" else f" {theirs}, not {ours}"
            raise SpeculatorError(
                f"{where}: made with {schema.verifier}, whose {what}{shown or ' are others'} than "
                f"those of {verifier}. Generate data with `data.verifier: {verifier}`."
            )
    check_tokenizer(where, schema.verifier, verifier)


def _load_verifier(plan: TrainingPlan, source: Source) -> PreTrainedModel | None:
    """The whole verifier, where it decodes or runs over texts."""
    if isinstance(source, TextExamples):
        return source.verifier
    if not plan.evaluation.decode:
        return None
    dtype = torch.bfloat16 if uses_bfloat16(plan) and torch.cuda.is_available() else torch.float32
    return load_verifier(plan.model.verifier, dtype, plan.model.trust_remote_code)


def _split(plan: TrainingPlan, source: Source) -> Split | None:
    if isinstance(source, Generation | Received):
        return None
    return Split.draw(source, plan.data.eval_examples, plan.data.limit, plan.run.seed)


def _token_counter(plan: TrainingPlan, source: Source) -> CountTokens | None:
    split = _split(plan, source)
    if split is None:
        return None
    assert not isinstance(source, Generation | Received)
    return partial(source.count_tokens, split.train)
