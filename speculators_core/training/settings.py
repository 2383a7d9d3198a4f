"""What is trained, on what, how, and where it goes.

A YAML file holds the five sections, flags of the command line win over it:

    model:      {algorithm: eagle3, verifier: Qwen/Qwen3-8B}
    data:       {store: states}
    optimizer:  {learning_rate: 1e-3}
    evaluation: {every: 500}
    run:        {output: runs/eagle3}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from speculators_core.flags import Several
from speculators_core.settings import Settings, read_sections

Schedule = Literal["cosine", "linear", "constant"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class TrainModelConfig(Settings):
    """The draft: a fresh one, or one that goes on learning."""

    verifier: str = Field(min_length=1)
    """Folder or hub id of the verifier."""
    algorithm: str | None = None
    """`eagle3`, `peagle`, `dflash`, `mtp`, or what another package registers in
    `speculators.models`; of a fresh draft."""
    start_from: str | None = None
    """Folder or hub id of a speculator that goes on learning, instead of a fresh one."""
    draft_config: Path | None = None
    """Config of a speculator (config.json) that a fresh draft is shaped by, instead of `recipe`."""
    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    """Shape of a fresh draft: options of the algorithm's `Recipe`."""
    objective: dict[str, JsonValue] = Field(default_factory=dict)
    """What is minimised: options of the algorithm's `Objective`."""
    draft_vocab_size: int | None = Field(None, ge=1)
    """Tokens that a fresh draft can say: the most frequent ones of the data, and the special ones;
    all where None."""
    verifier_name: str | None = None
    """What the checkpoint calls the verifier; `verifier` in full where None."""
    trust_remote_code: bool = False
    """Runs code that the verifier's folder brings."""

    @model_validator(mode="after")
    def _is_one_draft(self) -> Self:
        if (self.algorithm is None) == (self.start_from is None):
            raise ValueError("one of algorithm (a fresh draft) and start_from must be set")
        idle = [
            name
            for name in ("recipe", "draft_config", "draft_vocab_size", "verifier_name")
            if self.start_from is not None and getattr(self, name)
        ]
        if idle:
            raise ValueError(f"{idle[0]} is for a fresh draft; start_from has its own")
        if self.draft_config is not None and self.recipe:
            raise ValueError("recipe and draft_config exclude each other; set one")
        return self


class TrainDataConfig(Settings):
    """What the draft learns from; one of `store`, `queue`, `online` and `texts`."""

    KINDS: ClassVar[tuple[str, ...]] = ("store", "queue", "online", "texts")

    store: Path | None = None
    """Folder that `speculators generate-data` wrote."""
    queue: Path | None = None
    """Configuration of `speculators generate-data` that runs elsewhere, with `sync.kind: zmq` and
    a URL of `sync.urls` for each process of the training, where it receives."""
    online: Path | None = None
    """Configuration of `speculators generate-data`, which runs beside the training and is stopped
    with it; nothing is written to disk."""
    texts: Path | None = None
    """The same, with the verifier (on Transformers) in the training process: for small runs."""
    row_length: int = Field(2048, ge=16, le=2**20)
    """Tokens of a row, filled with whole examples; one longer than a row is cut."""
    eval_examples: int = Field(64, ge=0)
    """Examples that are held out, at most a tenth, chosen by the seed; of a queue the first."""
    limit: int | None = Field(None, ge=1)
    """Examples to train on, at most."""
    num_workers: int = Field(0, ge=0)
    """Processes that read rows ahead, of a store."""
    queue_size: int = Field(64, ge=1)
    """Examples that wait, at most, in a queue; then the engine waits."""

    @model_validator(mode="after")
    def _is_one_source(self) -> Self:
        stated = [name for name in self.KINDS if getattr(self, name) is not None]
        if len(stated) != 1:
            raise ValueError(
                f"one of {', '.join(self.KINDS)} must be set, found {', '.join(stated) or 'none'}"
            )
        if self.kind != "store":
            self.refuse_idle("num_workers", because=f"rows of data.{self.kind} are read in turn")
        if self.kind not in ("queue", "online"):
            self.refuse_idle("queue_size", because=f"data.{self.kind} has no queue")
        return self

    @property
    def kind(self) -> str:
        return next(name for name in self.KINDS if getattr(self, name) is not None)


class OptimizerConfig(Settings):
    """How weights follow gradients. They and all states are float32."""

    name: Literal["muon", "adamw"] = "muon"
    """Muon for the matrices inside and AdamW for all else, or AdamW for all."""
    learning_rate: float = Field(1e-3, gt=0)
    """At its highest."""
    weight_decay: float = Field(0.1, ge=0)
    """Of matrices; vectors have none."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_share: float = Field(0.03, ge=0, lt=1)
    """Of the steps, over which the learning rate rises."""
    final_share: float = Field(0.0, ge=0, lt=1)
    """Of the learning rate, at which a cosine ends."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them."""
    rows_per_step: int = Field(1, ge=1)
    """Rows of one step on each device, one after another (gradient accumulation)."""

    @model_validator(mode="after")
    def _no_option_is_idle(self) -> Self:
        if self.final_share and self.schedule != "cosine":
            raise ValueError("final_share is for schedule cosine")
        return self


class EvaluationConfig(Settings):
    """How the draft is measured on the way."""

    every: int | None = Field(None, ge=1)
    """Steps between evaluations; a tenth of the run, and at least 20, where None."""
    decode: bool = True
    """Decodes the prompts with the reference decoder, for the true acceptance length. It needs the
    whole verifier in memory."""
    prompts: str | None = None
    """JSONL file or hub id of prompts; what stands before the first trained token of the held-out
    examples where None."""
    num_prompts: int = Field(16, ge=1)
    """Prompts to decode, at most."""
    max_tokens: int = Field(64, ge=2)
    """Tokens to decode of each."""
    roll_outs: int = Field(512, ge=0)
    """Drafts rolled out over held-out examples, at most, for the predicted acceptance length."""
    patience: int | None = Field(None, ge=1)
    """Evaluations without a longer acceptance length, after which training stops."""

    @model_validator(mode="after")
    def _no_option_is_idle(self) -> Self:
        if not self.decode:
            names = ("prompts", "num_prompts", "max_tokens", "patience")
            self.refuse_idle(*names, because="evaluation.decode is false")
        return self


class TrainRunConfig(Settings):
    """How long, in which precision, and where it goes."""

    output: Path
    """Folder of the run; the speculator is in `speculator` below it."""

    @field_validator("output")
    @classmethod
    def _in_full(cls, output: Path) -> Path:
        return output.expanduser()

    epochs: float = Field(1.0, gt=0)
    """Passes over the data, where `max_steps` is None."""
    max_steps: int | None = Field(None, ge=1)
    """Steps in all; the data decide where None. A queue needs it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation: bfloat16 on a GPU, float32 on a CPU with `auto`."""
    saved_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the speculator in the end."""
    save_every: int | None = Field(None, ge=1)
    """Steps between saved states; at each evaluation where None."""
    keep: int = Field(2, ge=1)
    """Saved states to keep; the best one is kept beside them."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of the log."""
    gradient_checkpointing: bool = False
    """Computes each layer's MLP and its norm again in the backward pass, for less memory."""
    compile: bool = False
    """Compiles the MLPs of the draft (`torch.compile`)."""
    fsdp: bool = False
    """Shards weights and optimizer over the processes of torchrun (FSDP2); copies (DDP) without."""
    seed: int = Field(0, ge=0)
    """Of weights, order and draws."""
    check: bool = True
    """Runs `speculators check` on the result, where vLLM is installed."""
    trackers: Annotated[tuple[Tracker, ...], Several] = ()
    """Where figures go beside the log."""
    license: str | None = None
    """Of the speculator, for its model card: `apache-2.0`."""

    @model_validator(mode="after")
    def _no_option_is_idle(self) -> Self:
        if self.max_steps is not None:
            self.refuse_idle("epochs", because="run.max_steps says how long")
        return self


class TrainingPlan(Settings):
    """All five sections."""

    model: TrainModelConfig
    data: TrainDataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    run: TrainRunConfig

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.data.kind in ("queue", "online") and self.run.max_steps is None:
            raise ValueError(
                f"run.max_steps is missing: data.{self.data.kind} does not say how much it has"
            )
        if self.evaluation.roll_outs and not self.data.eval_examples:
            because = "data.eval_examples is 0: there is nothing to roll out in"
            self.evaluation.refuse_idle("roll_outs", because=because)
        return self


def read_training_plan(
    file: Path | None, flags: Mapping[str, Settings | None] | None = None
) -> TrainingPlan:
    """The plan of a YAML file, with the options that flags set in their place.

    Raises:
        SpeculatorError: the file cannot be read, or an option is unknown or out of bounds.
    """
    sections: dict[str, Any] = read_sections(file, TrainingPlan, flags or {})
    return TrainingPlan.read(sections, "flags" if file is None else str(file))
