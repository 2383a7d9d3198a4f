"""Stages of a build, each skipped once done."""

import errno
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import yaml
from pydantic import Field, JsonValue
from transformers import PreTrainedTokenizerBase

from speculators_core.building.prompts import MEASURED, TRAIN, PromptsReport, split_prompts
from speculators_core.building.settings import BuildPlan
from speculators_core.building.stage_files import StageFolder, StageRecord, check_unchanged
from speculators_core.building.verifier_checks import open_tokenizer
from speculators_core.console import console, sigterm_as_interrupt
from speculators_core.data_generation.answers.regenerate import regenerate
from speculators_core.data_generation.answers.settings import AnswersConfig, RegenerateConfig
from speculators_core.data_generation.engines.pipeline import schema_of
from speculators_core.data_generation.reasons import describe_reasons
from speculators_core.data_generation.runs.generate import generate_data, left_out
from speculators_core.data_generation.runs.preparation import decides_bytes
from speculators_core.data_generation.settings import (
    DataGenConfig,
    DatasetConfig,
    GenerationPlan,
    RunConfig,
    StatesConfig,
    SyncConfig,
)
from speculators_core.diagnosis.acceptance_report import AcceptanceReport
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import in_full, locked, make_folder, write_text
from speculators_core.format.checkpoint import as_dtype
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.provenance import sample_weights
from speculators_core.registry import ANSWERERS, ENGINES
from speculators_core.settings import Settings, flat
from speculators_core.training.budget.free_space import free_disk_bytes
from speculators_core.training.device import training_device
from speculators_core.training.draft import draft_class
from speculators_core.training.finish import MEASURED as ACCEPTANCE
from speculators_core.training.ranks import world_size
from speculators_core.training.settings import (
    TrainDataConfig,
    TrainingPlan,
    TrainModelConfig,
    TrainRunConfig,
)
from speculators_core.training.states.run_folder import (
    CHANGEABLE_ON_RESUME,
    SPECULATOR,
    hash_local,
    hash_store,
)
from speculators_core.training.train import TrainReport, train
from speculators_core.verifier.reading import read_verifier_config
from speculators_core.verifier.sizes import LONGEST, read_size

logger = logging.getLogger(__name__)

PLAN = "build.yaml"
ANSWERS, STATES = "answers.jsonl", "states"
NAMES = ("prompts", "answers", "states", "training")
USUAL_LENGTH = 2048
LARGE_VOCABULARY, REDUCED_VOCABULARY = 32_768, 8_192
"""Beyond the first, a draft on a CPU has a vocabulary of the second by default. Measured on two
cores with a verifier of hidden size 576 and 49,152 tokens: a step of three proposals costs 1.48
plain steps with 8,192 tokens, and a step of one proposal costs 1.61 with all of them."""
MOST_MEASURED = 48
"""Prompts that an evaluation decodes by default."""
NO_GAIN = 1.1
"""Acceptance length below which a draft gains nothing."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


class BuiltStage(Settings):
    """A stage of a build."""

    name: str
    folder: Path
    was_done: bool
    """Whether an earlier run of the build had done it."""
    seconds: float
    report: dict[str, JsonValue]


class BuildReport(Settings):
    """How a build ended."""

    speculator: Path | None
    """Folder of the checkpoint; None if the training was stopped before its end."""
    stages: tuple[BuiltStage, ...]
    verdict: str | None = None
    """Verdict of `speculators check`; None if it was not run."""
    acceptance_length: float | None = None
    categories: dict[str, float] = Field(default_factory=dict)
    """Acceptance length by category of the measured prompts."""

    @property
    def without_gain(self) -> list[str]:
        """Categories in which the draft gains nothing."""
        return [name for name, length in self.categories.items() if length < NO_GAIN]


@dataclass(frozen=True)
class Stage:
    """A step of a build: where it is, how it runs, and digests of what it wrote."""

    folder: StageFolder
    run: Callable[[], dict[str, JsonValue]]
    digests: Callable[[], dict[str, str]]


class Stopped(Exception):
    """The training was stopped by a signal, and can be resumed."""


def build(plan: BuildPlan) -> BuildReport:
    """Builds a speculator, or resumes the build in its folder.

    Nothing heavy starts before plan, data sets, tokenizer and chat template have been checked.

    Raises:
        SpeculatorError: plan, data or verifier are at fault, a stage's folder was changed by
            somebody else, or a stage failed; what the stages wrote is kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same build resumes.
    """
    job = Build(plan)
    done: list[BuiltStage] = []
    with locked(job.output):
        write_text(job.output / PLAN, job.plan_text)
        try:
            for stage in job.stages():
                done.append(job.finish(stage))
        except Stopped:
            return BuildReport(speculator=None, stages=tuple(done))
        _link(job.output / SPECULATOR, done[-1].folder / SPECULATOR)
    return job.report(tuple(done))


class Build:
    """The plan of a build with what its verifier decides."""

    def __init__(self, plan: BuildPlan) -> None:
        """Checks what can be checked without loading a verifier.

        Raises:
            SpeculatorError: an option is at fault, or the verifier cannot answer.
        """
        self.plan = plan
        self.output = in_full(plan.run.output)
        model = plan.model
        if world_size() > 1:
            raise SpeculatorError(
                f"build runs in one process, found {world_size()} of torchrun. Run `speculators "
                "build` without it, or the commands of the stages one by one."
            )
        for dataset in plan.prompts.datasets:
            dataset.local_path()
        is_local = Path(model.verifier).expanduser().is_dir()
        self.verifier = str(in_full(model.verifier)) if is_local else model.verifier
        config = read_verifier_config(self.verifier, model.trust_remote_code).get_text_config()
        draft_class(model)
        ENGINES.load(plan.engine.name)
        ANSWERERS.load(self.answers_engine)
        self.positions = read_size(config, "max_position_embeddings") or LONGEST
        self.vocab_size = config.vocab_size
        self.max_length = plan.prompts.max_length or min(USUAL_LENGTH, self.positions)
        if self.max_length > self.positions:
            raise SpeculatorError(
                f"prompts.max_length is {self.max_length}; expected at most {self.positions}, the "
                f"positions of {self.verifier}. Reduce it."
            )
        self.tokenizer: PreTrainedTokenizerBase = open_tokenizer(
            self.verifier, plan.answers.sampling.template_options
        )

    @cached_property
    def weights(self) -> dict[str, JsonValue]:
        """What a stage's digest holds of the verifier."""
        folder = Path(self.verifier)
        files = {name: hash_local(folder / name) for name in TOKENIZER_FILES}
        return {"name": self.verifier, "weights": sample_weights(folder), **files}

    @property
    def plan_text(self) -> str:
        content = self.plan.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(content, sort_keys=False)

    @property
    def answers_engine(self) -> str:
        """The engine that answers."""
        given = self.plan.answers
        usual = "vllm" if find_spec("vllm") is not None else "transformers"
        return given.engine or ("openai" if given.endpoint.base_url is not None else usual)

    @property
    def draft_vocab_size(self) -> int | None:
        """Vocabulary size of the draft; None for the verifier's whole vocabulary."""
        model = self.plan.model
        recipe = draft_class(model).recipe_class.model_fields
        if model.draft_vocab_size is not None or model.start_from is not None:
            return model.draft_vocab_size
        is_reduced = "aux_layer_ids" in recipe  # MTP has the verifier's head
        if model.draft_config is None and is_reduced and training_device().type == "cpu":
            return REDUCED_VOCABULARY if self.vocab_size > LARGE_VOCABULARY else None
        return None

    # ---- stages ----

    def stages(self) -> Iterator[Stage]:
        """The stages in order; each is made once those before it are done."""
        prompts = self.prompts_stage()
        yield prompts
        answers = self.answers_stage(prompts)
        yield answers
        states = self.states_stage(answers)
        yield states
        yield self.training_stage(prompts, states)

    def folder(self, name: str, made_of: dict[str, JsonValue]) -> StageFolder:
        return StageFolder(self.output, NAMES.index(name) + 1, name, made_of)

    def prompts_stage(self) -> Stage:
        plan = self.plan
        section = plan.prompts.model_dump(mode="json", exclude={"max_length", "min_trained_tokens"})
        if plan.evaluation.prompts is not None or not plan.evaluation.decode:
            section["measured_per_category"] = 0
        local = [dataset.local_path() for dataset in plan.prompts.datasets]
        folder = self.folder(
            "prompts",
            {
                "prompts": section,
                "template_options": dict(plan.answers.sampling.template_options),
                "max_length": self.max_length,
                "content": [None if path is None else hash_local(path) for path in local],
                "tokenizer": {name: self.weights[name] for name in TOKENIZER_FILES},
            },
        )

        def run() -> dict[str, JsonValue]:
            report = split_prompts(plan, self.max_length, self.tokenizer, folder.path)
            return report.model_dump(mode="json")

        return Stage(folder, run, lambda: _digests(folder.path, TRAIN, MEASURED))

    def answers_settings(self, output: Path) -> RegenerateConfig:
        given = self.plan.answers
        offline = given.offline
        if self.answers_engine == "vllm" and "max_model_len" not in offline.engine_args:
            arguments = {**offline.engine_args, "max_model_len": self.max_length}
            offline = offline.model_copy(update={"engine_args": arguments})
        return RegenerateConfig(
            output=output,
            answers=AnswersConfig(
                engine=self.answers_engine,
                verifier=self.verifier,
                token_ids=True,
                sampling=given.sampling,
                endpoint=given.endpoint,
                offline=offline,
            ),
            cut="keep",
            resume=True,
            max_failures=given.max_failures,
            allowed_roots=(self.output,),
        )

    def answers_stage(self, prompts: Stage) -> Stage:
        settings = self.answers_settings(Path(ANSWERS))
        folder = self.folder(
            "answers",
            {
                "answers": settings.answers.model_dump(
                    mode="json",
                    exclude={
                        "endpoint": {"concurrency", "retries", "timeout_s"},
                        "offline": {"batch_size", "verbose"},
                    },
                ),
                "verifier": self.weights,
                "input": prompts.digests()[TRAIN],
            },
        )

        def run() -> dict[str, JsonValue]:
            train = DatasetConfig(path=str(prompts.folder.path / TRAIN))
            report = regenerate(train, self.answers_settings(folder.path / ANSWERS))
            if not report.num_in_output:
                raise SpeculatorError(
                    f"no conversation was answered; {describe_reasons(report.set_aside)}. Correct "
                    "the cause, or the prompts."
                )
            counts = count_tokens(folder.path / ANSWERS)
            return {**counts, "set_aside": dict(report.set_aside)}

        return Stage(folder, run, lambda: _digests(folder.path, ANSWERS))

    def generation_plan(self, answers: Path, store: Path) -> GenerationPlan:
        """The plan that reads the answers and stores the verifier's states."""
        plan = self.plan
        data = DataGenConfig(
            verifier=self.verifier,
            datasets=(DatasetConfig(path=str(answers)),),
            states=StatesConfig(layer_ids=self.layer_ids),
            min_trained_tokens=plan.prompts.min_trained_tokens,
            trust_remote_code=plan.model.trust_remote_code,
        )
        return GenerationPlan(
            data=data,
            engine=plan.engine.model_copy(update={"max_length": self.max_length}),
            sync=SyncConfig(path=store, shard_tokens=plan.run.shard_tokens),
            run=RunConfig(
                resume=True, allowed_roots=(self.output, answers.parent), seed=plan.run.seed
            ),
        )

    @cached_property
    def layer_ids(self) -> tuple[int, ...] | None:
        """Layers whose states the draft reads, beside the last; None for the algorithm's."""
        model = self.plan.model
        shaped = model.start_from or (model.draft_config and str(model.draft_config.parent))
        if shaped:
            depth = read_size(
                read_verifier_config(self.verifier, model.trust_remote_code).get_text_config(),
                "num_hidden_layers",
            )
            ids = SpeculatorModelConfig.from_pretrained(shaped).aux_layer_ids
            return tuple(layer for layer in ids if layer != depth)
        if "aux_layer_ids" not in draft_class(model).recipe_class.model_fields:
            return ()  # the last state alone
        stated = model.recipe.get("aux_layer_ids")
        return tuple(int(str(layer)) for layer in stated) if isinstance(stated, list) else None

    def states_stage(self, answers: Stage) -> Stage:
        path = answers.folder.path / ANSWERS
        made_from = flat(decides_bytes(self.generation_plan(path, Path(STATES))))
        del made_from["data.datasets"]  # its content is the input
        folder = self.folder(
            "states",
            {
                "plan": made_from,
                "verifier": self.weights,
                "input": answers.digests()[ANSWERS],
            },
        )

        def run() -> dict[str, JsonValue]:
            plan = self.generation_plan(path, folder.path / STATES)
            tokens = count_tokens(path)["num_tokens"]
            check_room(folder.path, tokens * self.state_bytes(plan))
            report = generate_data(plan)
            if report.is_empty or report.store is None:
                raise SpeculatorError(
                    f"no answer has states; {describe_reasons(left_out(report))}. Correct the "
                    "cause, or the prompts."
                )
            return report.store.model_dump(mode="json")

        return Stage(folder, run, lambda: _digest_store(folder.path))

    def state_bytes(self, plan: GenerationPlan) -> int:
        """Bytes that the states of a token take on disk."""
        schema = schema_of(plan)
        return len(schema.layer_ids) * schema.hidden_size * as_dtype(plan.sync.dtype).itemsize

    def training_plan(self, measured: Path | None, store: Path, output: Path) -> TrainingPlan:
        plan, evaluation = self.plan, self.plan.evaluation
        if measured is not None:
            update: dict[str, object] = {"prompts": str(measured)}
            if evaluation.num_prompts == type(evaluation).model_fields["num_prompts"].default:
                update["num_prompts"] = MOST_MEASURED
            options = dict(plan.answers.sampling.template_options)
            update["template_options"] = evaluation.template_options or options
            evaluation = evaluation.model_copy(update=update)
        model = plan.model.model_dump() | {"draft_vocab_size": self.draft_vocab_size}
        run = plan.run.model_dump(exclude={"shard_tokens", "eval_examples"}) | {"output": output}
        if plan.run.max_steps is not None:
            del run["epochs"]
        return TrainingPlan(
            model=TrainModelConfig.model_validate(model | {"verifier": self.verifier}),
            data=TrainDataConfig(
                store=store, row_length=self.max_length, eval_examples=plan.run.eval_examples
            ),
            optimizer=plan.optimizer,
            evaluation=evaluation,
            run=TrainRunConfig.model_validate(run),
        )

    def training_stage(self, prompts: Stage, states: Stage) -> Stage:
        measured = measured_prompts(prompts.folder.path)
        store = states.folder.path / STATES
        options = self.training_plan(measured, Path(STATES), Path("run")).model_dump(mode="json")
        paths = {"data.store", "evaluation.prompts"} if measured else {"data.store"}
        user_prompts = self.plan.evaluation.prompts
        folder = self.folder(
            "training",
            {
                "plan": {
                    key: value
                    for key, value in flat(options).items()
                    if key not in CHANGEABLE_ON_RESUME | paths
                },
                "verifier": self.weights,
                "input": dict(states.digests()),
                "measured": prompts.digests()[MEASURED],
                "prompts": None if user_prompts is None else hash_local(Path(user_prompts)),
            },
        )

        def run() -> dict[str, JsonValue]:
            report = train(self.training_plan(measured, store, folder.path))
            if report.speculator is None:
                raise Stopped
            return report.model_dump(mode="json")

        return Stage(folder, run, lambda: _digest_speculator(folder.path))

    # ---- running ----

    def finish(self, stage: Stage) -> BuiltStage:
        """Runs a stage, unless it is done.

        Raises:
            SpeculatorError: it failed, or its folder was changed by somebody else.
            Stopped: a signal stopped the training.
        """
        folder = stage.folder
        title = f"stage {folder.number} of {len(NAMES)}, {folder.name}"
        record = folder.read()
        was_done = record is not None
        if record is not None:
            check_unchanged(folder, record, stage.digests())
            console.print(f"{title}: done before, {folder.path}", markup=False, soft_wrap=True)
        else:
            how = "resumed" if folder.has_begun else "started"
            console.print(f"{title}: {how} in {folder.path}", markup=False, soft_wrap=True)
            with _named(title):
                make_folder(folder.path)
                start = time.monotonic()
                with nullcontext() if folder.name == NAMES[-1] else sigterm_as_interrupt():
                    report = stage.run()
                record = StageRecord(
                    stage=folder.name,
                    made_of=folder.made_of,
                    output=stage.digests(),
                    seconds=time.monotonic() - start,
                    report=report,
                )
                folder.write(record)
        for line in about(folder.name, record.report):
            console.print(f"  {line}", markup=False, soft_wrap=True)
        return BuiltStage(
            name=folder.name,
            folder=folder.path,
            was_done=was_done,
            seconds=record.seconds,
            report=record.report,
        )

    def report(self, stages: tuple[BuiltStage, ...]) -> BuildReport:
        training = TrainReport.model_validate(stages[-1].report)
        found: dict[str, float] = {}
        length = training.figures.get("acceptance_length")
        file = stages[-1].folder / ACCEPTANCE / "report.json"
        if file.exists():
            (draft,) = AcceptanceReport.model_validate_json(file.read_bytes()).drafts
            (by_k,) = draft.by_k
            found = {name: part.acceptance_length for name, part in by_k.categories.items()}
            length = by_k.pooled.acceptance_length
        return BuildReport(
            speculator=self.output / SPECULATOR,
            stages=stages,
            verdict=training.verdict,
            acceptance_length=length,
            categories=found,
        )


# ---- what stages write ----


def measured_prompts(folder: Path) -> Path | None:
    """The file of measured prompts; None where there are none."""
    path = folder / MEASURED
    return path if path.exists() and path.stat().st_size else None


def count_tokens(answers: Path) -> dict[str, int]:
    """Rows of answers, their tokens, and those that the verifier wrote."""
    rows = tokens = written = 0
    with answers.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows += 1
            tokens += len(row["input_ids"])
            written += sum(row["loss_mask"])
    return {"num_documents": rows, "num_tokens": tokens, "num_written": written}


def _digests(folder: Path, *names: str) -> dict[str, str]:
    found = {name: hash_local(folder / name) for name in names}
    return {name: digest for name, digest in found.items() if digest is not None}


def _digest_store(folder: Path) -> dict[str, str]:
    """Checksums that the shards' headers state; the shards themselves are checked when read."""
    digest = hash_store(folder / STATES)
    return {} if digest is None else {STATES: digest}


def _digest_speculator(folder: Path) -> dict[str, str]:
    """Weights and config; the card may be edited."""
    speculator = folder / SPECULATOR
    weights = sorted(path.name for path in speculator.glob("*.safetensors"))
    return {
        f"{SPECULATOR}/{name}": digest
        for name, digest in _digests(speculator, "config.json", *weights).items()
    }


def about(stage: str, report: dict[str, JsonValue]) -> list[str]:
    """What a stage made, in a few lines."""
    if stage == "prompts":
        counts = PromptsReport.model_validate(report)
        lines = [
            f"{counts.num_train:,} prompts to train on, {counts.num_measured:,} to measure on; "
            f"categories: {', '.join(counts.categories)}"
        ]
        aside = counts.set_aside
    elif stage == "answers":
        lines = [
            f"{report['num_documents']:,} documents of {report['num_tokens']:,} tokens, "
            f"{report['num_written']:,} of them written by the verifier"
        ]
        given = report["set_aside"]
        assert isinstance(given, dict)
        aside = {str(reason): int(str(number)) for reason, number in given.items()}
    else:
        return []
    return lines + ([f"set aside: {describe_reasons(aside)}"] if aside else [])


def check_room(folder: Path, needed_bytes: int) -> None:
    """Checks a disk before a stage fills it.

    Raises:
        SpeculatorError: the stage needs more than is free.
    """
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = free_disk_bytes(folder)
    if needed_bytes > free + there:
        raise SpeculatorError(
            f"{folder} needs {needed_bytes / 2**30:.1f} GiB for the states of all answers; "
            f"{(free + there) / 2**30:.1f} GiB are free. Make room, or use fewer prompts or "
            "another run.output."
        )


@contextmanager
def _named(title: str) -> Iterator[None]:
    """Errors and stops inside with the stage's name, and what to do."""
    try:
        yield
    except SpeculatorError as error:
        raise error.within(title) from error
    except OSError as error:
        what = "make room on the disk" if error.errno == errno.ENOSPC else "correct the cause"
        raise SpeculatorError(
            f"{title}: {first_line(error)}. What the stages wrote is kept: {what} and run the same "
            "command again."
        ) from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"stopped in {title}; what the stages wrote is kept. Run the same command again to "
            "resume."
        ) from stop


def _link(link: Path, target: Path) -> None:
    """Points a link at the speculator of this build."""
    part = link.with_name(f".{link.name}.part")
    part.unlink(missing_ok=True)
    part.symlink_to(target.relative_to(link.parent))
    part.replace(link)


def print_report(report: BuildReport) -> None:
    """Where the speculator is, and what it gains."""
    if report.speculator is None:
        console.print("stopped in training; run the same command again to resume")
        return
    if report.verdict is not None:
        console.print(f"speculators check: {report.verdict}", markup=False)
    for name, length in report.categories.items():
        console.print(f"tau {length:.2f}  {name}", markup=False, highlight=False)
    if report.acceptance_length is not None:
        console.print(
            f"tau {report.acceptance_length:.2f}  all measured prompts",
            markup=False,
            highlight=False,
        )
    if report.without_gain:
        console.print(
            f"no gain (tau below {NO_GAIN}): {', '.join(report.without_gain)}. Add prompts of "
            "these kinds, or train longer.",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"wrote {report.speculator}", markup=False, soft_wrap=True)
