"""Settings of a training run, in five sections.

They are the sections of a YAML file; flags of the command line take precedence:

    model:      {algorithm: eagle3, verifier: Qwen/Qwen3-8B}
    data:       {store: states}
    optimizer:  {learning_rate: 1e-3}
    evaluation: {every: 500}
    run:        {output: runs/eagle3}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from speculators_core.flags import JsonOptions, Several
from speculators_core.settings import Settings, read_sections

Schedule = Literal["cosine", "linear", "constant"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class TrainModelConfig(Settings):
    """The draft: a fresh one (`algorithm`), or one that is trained further (`start_from`)."""

    verifier: str = Field(min_length=1)
    """Folder or hub id of the verifier."""
    algorithm: str | None = None
    """Algorithm of a fresh draft: `eagle3`, `peagle`, `dflash`, `mtp`, or one of another package
    (group `speculators.models`)."""
    start_from: str | None = None
    """Folder or hub id of a speculator to train further, instead of a fresh draft."""
    draft_config: Path | None = None
    """Config of a speculator (config.json) whose shape a fresh draft takes, instead of `recipe`."""
    recipe: JsonOptions = Field(default_factory=dict)
    """Shape of a fresh draft: options of the algorithm's recipe, as JSON or as single flags
    (`--model.recipe.num-layers 2`)."""
    objective: JsonOptions = Field(default_factory=dict)
    """Loss: options of the algorithm's objective, as JSON or as single flags."""
    draft_vocab_size: int | None = Field(None, ge=1)
    """Vocabulary size of a fresh draft: special tokens and the most frequent ones of the data; the
    verifier's whole vocabulary if not set."""
    verifier_name: str | None = None
    """Name of the verifier in the checkpoint; `verifier` as a full path if not set."""
    trust_remote_code: bool = False
    """Run Python code from the verifier's folder."""

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
    """Source of the training examples: exactly one of `store`, `queue`, `online` and `texts`."""

    KINDS: ClassVar[tuple[str, ...]] = ("store", "queue", "online", "texts")

    store: Path | None = None
    """Folder written by `speculators generate-data`."""
    queue: Path | None = None
    """Configuration of a `speculators generate-data` that runs elsewhere and sends its examples
    here. It has `sync.kind: zmq` and, in `sync.urls`, an address for each training process."""
    online: Path | None = None
    """Configuration of a `speculators generate-data` to run beside the training, without writing to
    disk. It is stopped when the training ends."""
    texts: Path | None = None
    """Configuration of `speculators generate-data` whose verifier runs in the training process, on
    Transformers; for small runs."""
    row_length: int = Field(2048, ge=16, le=2**20)
    """Tokens of a row. Rows are filled with whole examples; a longer example is cut."""
    eval_examples: int = Field(64, ge=0)
    """Examples to hold out for evaluation, at most a tenth of all: chosen by the seed, or the first
    ones of a queue."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of training examples."""
    num_workers: int = Field(0, ge=0)
    """Processes that read rows of a store ahead."""
    queue_size: int = Field(64, ge=1)
    """Maximum number of examples waiting in a queue; beyond it the engine pauses."""

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
    """Optimizer. Weights and optimizer states are float32."""

    name: Literal["muon", "adamw"] = "muon"
    """`muon` (Muon for the matrices of the layers, AdamW for everything else) or `adamw`."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of matrices; vectors are not decayed."""
    schedule: Schedule = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup_share: float = Field(0.03, ge=0, lt=1)
    """Fraction of all steps used for warm-up."""
    final_share: float = Field(0.0, ge=0, lt=1)
    """Learning rate at the end of a cosine schedule, as a fraction of the peak."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Norm to which gradients are clipped; 0 turns clipping off."""
    rows_per_step: int = Field(1, ge=1)
    """Rows per step on each device, one after another (gradient accumulation)."""

    @model_validator(mode="after")
    def _no_option_is_idle(self) -> Self:
        if self.final_share and self.schedule != "cosine":
            raise ValueError("final_share is for schedule cosine")
        return self


class EvaluationConfig(Settings):
    """Evaluation of the draft during the training."""

    every: int | None = Field(None, ge=1)
    """Steps between evaluations; a tenth of the run, at least 20, if not set."""
    decode: bool = True
    """Decode prompts with the reference decoder to measure the acceptance length. Needs memory for
    the whole verifier."""
    prompts: str | None = None
    """Prompts to decode: JSON lines (also .gz or .zst), Parquet or a hub data set; the untrained
    beginnings of the held-out examples if not set."""
    template_options: JsonOptions = Field(default_factory=dict)
    """Variables of the chat template for all prompts, such as `{"enable_thinking": false}`; those
    in a prompt's `chat_template_kwargs` take precedence."""
    num_prompts: int = Field(16, ge=1)
    """Maximum number of prompts to decode."""
    max_tokens: int = Field(64, ge=2)
    """New tokens to decode for each prompt."""
    roll_outs: int = Field(512, ge=0)
    """Maximum number of drafts rolled out over the held-out examples to predict the acceptance
    length."""
    patience: int | None = Field(None, ge=1)
    """Evaluations without a new best acceptance length after which the training stops."""

    @model_validator(mode="after")
    def _no_option_is_idle(self) -> Self:
        if not self.decode:
            names = ("prompts", "template_options", "num_prompts", "max_tokens", "patience")
            self.refuse_idle(*names, because="evaluation.decode is false")
        if self.prompts is None:
            self.refuse_idle("template_options", because="evaluation.prompts is not set")
        return self


class TrainRunConfig(Settings):
    """Duration, precision and output of the run."""

    output: Path
    """Folder of the run; the speculator is written to its subfolder `speculator`."""

    @field_validator("output")
    @classmethod
    def _in_full(cls, output: Path) -> Path:
        return output.expanduser()

    epochs: float = Field(1.0, gt=0)
    """Passes over the data, if `max_steps` is not set."""
    max_steps: int | None = Field(None, ge=1)
    """Number of steps, instead of `epochs`. Required for a queue and online."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    saved_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the speculator's checkpoint."""
    save_every: int | None = Field(None, ge=1)
    """Steps between saved states; every evaluation if not set."""
    keep: int = Field(2, ge=1)
    """Saved states to keep, in addition to the best one."""
    log_every: int = Field(10, ge=1)
    """Steps between log lines."""
    gradient_checkpointing: bool = False
    """Recompute each layer's MLP and its norm in the backward pass, to save memory."""
    compile: bool = False
    """Compile the draft's MLPs with `torch.compile`."""
    fsdp: bool = False
    """Shard weights and optimizer states over the processes of torchrun (FSDP2), instead of keeping
    a copy in each (DDP)."""
    deepspeed: Path | None = None
    """Configuration file of DeepSpeed (JSON), whose ZeRO 1 to 3 shards optimizer states, gradients
    and weights over the processes of torchrun. Needs `optimizer.name: adamw`."""
    seed: int = Field(0, ge=0)
    """Seed for initial weights, data order and sampling."""
    check: bool = True
    """Run `speculators check` on the result, if vLLM is installed."""
    trackers: Annotated[tuple[Tracker, ...], Several] = ()
    """Trackers that receive the metrics, in addition to the log."""
    license: str | None = None
    """License of the speculator, for its model card; for example `apache-2.0`."""

    @model_validator(mode="after")
    def _no_option_is_idle(self) -> Self:
        if self.max_steps is not None:
            self.refuse_idle("epochs", because="run.max_steps is set")
        if self.deepspeed is not None and self.fsdp:
            raise ValueError("deepspeed and fsdp exclude each other; set one")
        return self


class TrainingPlan(Settings):
    """Everything that decides a training run."""

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
        if self.run.deepspeed is not None and self.optimizer.name != "adamw":
            raise ValueError(
                f"optimizer.name {self.optimizer.name}: run.deepspeed keeps matrices flat, which "
                "Muon cannot step; set it to adamw, or use run.fsdp"
            )
        if self.evaluation.roll_outs and not self.data.eval_examples:
            because = "data.eval_examples is 0: there is nothing to roll out in"
            self.evaluation.refuse_idle("roll_outs", because=because)
        return self


def read_training_plan(
    file: Path | None, flags: Mapping[str, Settings | None] | None = None
) -> TrainingPlan:
    """The plan of a YAML file; options that are set as flags take precedence.

    Raises:
        SpeculatorError: the file cannot be read, or an option is unknown or out of bounds.
    """
    sections = read_sections(file, TrainingPlan, flags or {})
    return TrainingPlan.read(sections, "flags" if file is None else str(file))
