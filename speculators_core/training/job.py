"""A training run in memory: data, draft and trainer."""

import gc
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from speculators_core.batch import Batch
from speculators_core.data_generation.lengths import Lengths
from speculators_core.data_generation.packing import RowLayout
from speculators_core.decoding.prompts import Prompt
from speculators_core.decoding.row_cache import check_can_forget
from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.training.budget.estimate import Estimate, estimate
from speculators_core.training.device import compute_dtype, training_device
from speculators_core.training.draft import draft_class, make_draft
from speculators_core.training.evaluation import (
    HeldOut,
    choose_prompts,
    measure_acceptance,
    named_prompts,
)
from speculators_core.training.optimizers import MuonAdamW, adamw
from speculators_core.training.ranks import rank, world_size
from speculators_core.training.rows.online import TextExamples
from speculators_core.training.rows.opening import (
    Source,
    generation_of,
    open_source,
    split_of,
    token_counter,
)
from speculators_core.training.rows.sources import Rows, Split, StoredExamples, Stream
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.sharding import shard
from speculators_core.training.states.state import read_weights
from speculators_core.training.states.state_folder import newest_state
from speculators_core.training.stop import StopOnSignal
from speculators_core.training.trainer import SpeculatorTrainer
from speculators_core.training.watch import (
    Display,
    LogFile,
    MarkRowsUsed,
    Schedule,
)
from speculators_core.training.zero import read_deepspeed_config
from speculators_core.verifier.reading import load_verifier, model_class_of, read_verifier_config
from speculators_core.verifier.sizes import LONGEST, read_size, required_size

logger = logging.getLogger(__name__)

LOG = "training_log.jsonl"


class Job:
    """Everything that a run needs; `open` makes it."""

    source: Source
    draft: SpeculatorModel

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan = plan
        self.generation = generation_of(plan)
        self.stop = StopOnSignal()
        self.trainer: SpeculatorTrainer | None = None
        self._prompts: list[list[int]] | None = None

    @classmethod
    @contextmanager
    def open(cls, plan: TrainingPlan) -> Iterator["Job"]:
        """Checks options and data, then loads the verifier and makes the draft.

        Raises:
            SpeculatorError: plan, data and verifier do not fit together, or cannot be read.
        """
        draft_class(plan.model)
        _check_trackers(plan)
        if plan.run.fsdp and world_size() == 1:
            raise SpeculatorError(
                "run.fsdp shards over several processes, found one. Start the run with `torchrun "
                "--nproc-per-node N -m speculators_core train ...`, or leave run.fsdp out."
            )
        if plan.run.deepspeed is not None:
            read_deepspeed_config(plan.run.deepspeed)  # before anything is loaded
        with ExitStack() as stack:
            stack.callback(_leave_group)
            job = cls(_with_possible_decoding(plan))
            if job.named_prompts:
                job.check_prompts()  # before anything is loaded
            source = job.source = open_source(plan, job.generation, stack)
            if isinstance(source, StoredExamples):
                job.check_prompts()
            job.draft = _make_draft(job.plan, source)
            del source
            yield job

    def release(self) -> None:
        """Frees the memory of draft, verifier and optimizer; the job cannot be used afterwards."""
        self.trainer = None
        for name in ("draft", "source", "rows", "held_out"):
            vars(self).pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- rows ----

    @cached_property
    def layout(self) -> RowLayout:
        row_length = self.plan.data.row_length
        return RowLayout.of(self.source.schema, self.draft.aux_layer_ids, row_length)

    @cached_property
    def split(self) -> Split | None:
        """The split of numbered examples; None for a stream."""
        return split_of(self.plan, self.source)

    @cached_property
    def rows(self) -> Rows | Stream:
        """The rows to train on. The held-out examples of a stream are received here."""
        data = self.plan.data
        if self.source.is_stream:
            self.source.while_waiting = self.stop.check
            return Stream(self.source, self.layout, data.eval_examples, data.limit)
        assert self.split is not None
        return Rows(self.source, self.split.train, self.layout)

    @cached_property
    def held_out(self) -> HeldOut:
        if self.source.is_stream:
            assert isinstance(self.rows, Stream)
            return HeldOut(self.rows.held_out, self.source.schema)
        assert self.split is not None
        return HeldOut(self.source.read(self.split.held_out), self.source.schema)

    @property
    def eval_rows(self) -> list[Batch]:
        return [self.layout.pack(row) for row in self.layout.rows(self.held_out.examples)]

    @property
    def rows_per_step(self) -> int:
        """Rows of one step, of all ranks."""
        return self.plan.optimizer.rows_per_step * world_size()

    @property
    def num_steps(self) -> int:
        plan = self.plan
        if plan.run.max_steps is not None:
            return plan.run.max_steps
        assert isinstance(self.rows, Rows)
        return math.ceil(plan.run.epochs * math.ceil(len(self.rows) / self.rows_per_step))

    def estimate(self, *, is_timed: bool) -> Estimate:
        """What the run takes; where ``is_timed``, from a few steps that are made for it."""
        rows = None if self.source.is_stream else self.rows  # a stream is not opened for this
        assert not isinstance(rows, Stream)
        return estimate(
            self.plan,
            self.draft,
            num_steps=self.num_steps,
            num_rows=None if rows is None else len(rows),
            num_tokens=None if rows is None else rows.num_tokens,
            world_size=world_size(),
            stored_dtype=self.source.schema.real_dtype,
            is_timed=is_timed,
        )

    # ---- the run ----

    def train(self) -> TrainerState:
        """Trains, resuming from the newest saved state if there is one.

        Raises:
            SpeculatorError: a loss was not finite, or the data ended early.
        """
        plan = self.plan
        trainer = self.trainer = self.make_trainer()
        newest = newest_state(plan.run.output)
        with self.watching(trainer) as schedule, self.stop.listening():
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        state = trainer.state
        if state.global_step < self.num_steps and not (self.was_stopped or schedule.has_ended):
            raise SpeculatorError(
                f"data.{plan.data.kind} had no more rows to train on after step "
                f"{state.global_step} of {self.num_steps}. Generate more examples with a token to "
                f"learn than data.eval_examples ({plan.data.eval_examples}), or lower "
                "run.max_steps."
            )
        return state

    @contextmanager
    def watching(self, trainer: SpeculatorTrainer) -> Iterator[Schedule]:
        """Evaluates, saves, logs and displays while the trainer runs."""
        plan, section = self.plan, self.plan.evaluation
        schedule = Schedule(section.every, plan.run.save_every, section.patience, trainer.evaluate)
        display = Display(self.rows_per_step * plan.data.row_length)
        for callback in (schedule, self.stop, LogFile(plan.run.output / LOG), display):
            trainer.add_callback(callback)
        if isinstance(self.rows, Stream):
            trainer.add_callback(MarkRowsUsed(self.rows))
        try:
            yield schedule
        finally:
            display.close()

    def example_lengths(self) -> Lengths:
        """Lengths of the examples that were trained on, on all ranks; every rank calls it."""
        lengths = self.rows.lengths
        if isinstance(self.rows, Stream) and torch.distributed.is_initialized():
            of_ranks: list[Lengths | None] = [None] * world_size()
            torch.distributed.all_gather_object(of_ranks, lengths)
            return sum(filter(None, of_ranks), start=Lengths())
        return lengths

    def best_draft(self) -> SpeculatorModel:
        """The draft with its best weights, those of the longest acceptance length, or the last.

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
    def was_stopped(self) -> bool:
        """Whether a signal stopped the run before its end."""
        was_waiting = self.trainer is not None and self.trainer.was_interrupted
        return self.stop.has_stopped or was_waiting

    def make_trainer(self) -> SpeculatorTrainer:
        """The trainer without the callbacks of `watch`."""
        plan, draft = self.plan, self.draft
        arguments = training_arguments(plan, self.num_steps)
        arguments._n_gpu = min(arguments.n_gpu, 1)  # a process trains on one; torchrun starts more
        if plan.run.compile:
            for name, module in draft.named_modules():
                if name.endswith(".mlp"):
                    module.compile(dynamic=True)  # rows differ in length between unroll steps
        if plan.run.fsdp:
            dtype = torch.bfloat16 if arguments.bf16 else None
            shard(draft, arguments.device, dtype)
        rate, decay = plan.optimizer.learning_rate, plan.optimizer.weight_decay
        make = MuonAdamW if plan.optimizer.name == "muon" else adamw
        train_kwargs, eval_kwargs = draft.trainer_kwargs(plan.model.objective)
        return SpeculatorTrainer(
            draft,
            arguments,
            train_kwargs=train_kwargs,
            eval_kwargs=eval_kwargs,
            measure=self._measure,
            keep=plan.run.keep,
            train_dataset=self.rows,
            eval_dataset=self.eval_rows,
            optimizer=make(draft, rate, decay),
        )

    @cached_property
    def named_prompts(self) -> list[Prompt]:
        """The prompts of ``evaluation.prompts`` to decode."""
        return named_prompts(self.plan.evaluation)

    def check_prompts(self) -> None:
        """Reads the prompts to decode, unless that was done before.

        It is called as early as they can be read, so that a fault in them costs no time.

        Raises:
            SpeculatorError: they cannot be read, or there are none.
        """
        if self._prompts is None:
            self._prompts = self._choose_prompts() if self.plan.evaluation.decode else []

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids to decode at each evaluation."""
        assert self._prompts is not None
        return self._prompts

    def _choose_prompts(self) -> list[list[int]]:
        section, model = self.plan.evaluation, self.plan.model
        config = read_verifier_config(model.verifier, model.trust_remote_code).get_text_config()
        examples = [] if self.named_prompts else self.held_out.examples
        longest = read_size(config, "max_position_embeddings") or LONGEST
        vocab_size = required_size(config, "vocab_size")
        return choose_prompts(
            section, examples, model.verifier, longest, model.trust_remote_code, vocab_size
        )

    def _measure(self, draft: SpeculatorModel) -> dict[str, float]:
        section, held_out = self.plan.evaluation, self.held_out
        with self.stop.interruptible():
            return measure_acceptance(draft, self.prompts, held_out, section, rank(), world_size())


# ---- options of Transformers' trainer ----


def training_arguments(plan: TrainingPlan, num_steps: int) -> TrainingArguments:
    """The plan as arguments of the trainer; `watch` evaluates, saves and ends the run."""
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
        bf16=compute_dtype(plan, training_device()) == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        deepspeed=None if run.deepspeed is None else read_deepspeed_config(run.deepspeed),
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
        ignore_data_skip=data.kind == "queue",  # rows that were used are not sent again
    )


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_trackers(plan: TrainingPlan) -> None:
    for tracker in plan.run.trackers:
        if find_spec(tracker) is None:
            raise SpeculatorError(
                f"run.trackers: {tracker} is not installed. Run `pip install {tracker}`, or leave "
                "it out."
            )


# ---- the draft ----


def _with_possible_decoding(plan: TrainingPlan) -> TrainingPlan:
    """The plan, without decoding where the reference decoder cannot take tokens back."""
    model = plan.model
    if not plan.evaluation.decode:
        return plan
    config = read_verifier_config(model.verifier, model.trust_remote_code)
    model_class = model_class_of(config)
    if model_class is None:
        return plan
    try:
        check_can_forget(model_class, config)
    except SpeculatorError as error:
        by_length = " or patience, which goes by it" if plan.evaluation.patience else ""
        logger.warning(
            "training runs without evaluation.decode, and so without a measured acceptance "
            "length%s: %s",
            by_length,
            error,
        )
        off = {"decode": False, "prompts": None, "patience": None}
        evaluation = plan.evaluation.model_copy(update=off)
        return plan.model_copy(update={"evaluation": evaluation})
    return plan


def _make_draft(plan: TrainingPlan, source: Source) -> SpeculatorModel:
    verifier = _load_verifier(plan, source)
    set_seed(plan.run.seed)
    return make_draft(plan.model, verifier, source.schema, token_counter(plan, source))


def _load_verifier(plan: TrainingPlan, source: Source) -> PreTrainedModel | None:
    """The whole verifier, where it decodes or runs over texts; on a CPU in float32."""
    if isinstance(source, TextExamples):
        return source.verifier
    if not plan.evaluation.decode:
        return None
    device = training_device()
    dtype = compute_dtype(plan, device) if device.type == "cuda" else torch.float32
    return load_verifier(plan.model.verifier, dtype, plan.model.trust_remote_code)
