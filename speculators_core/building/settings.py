"""Settings of a build, in seven sections.

They are the sections of a YAML file; flags of the command line take precedence:

    model:      {verifier: Qwen/Qwen3-8B}
    prompts:    {datasets: [{path: prompts.jsonl}]}
    answers:    {sampling: {max_tokens: 1024}}
    engine:     {name: transformers}
    optimizer:  {learning_rate: 1e-3}
    evaluation: {max_tokens: 64}
    run:        {output: build}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from cyclopts import Parameter
from pydantic import Field, model_validator

from speculators_core.data_generation.answers.settings import (
    EndpointConfig,
    OfflineConfig,
    SamplingConfig,
)
from speculators_core.data_generation.settings import DatasetConfig, EngineConfig
from speculators_core.flags import Several
from speculators_core.settings import Settings, read_sections
from speculators_core.training.settings import (
    EvaluationConfig,
    OptimizerConfig,
    TrainModelConfig,
    TrainRunConfig,
)

DEFAULT_ALGORITHM = "eagle3"


class BuildModelConfig(TrainModelConfig):
    """The verifier and the draft: a fresh one, or one that is trained further (`start_from`)."""

    algorithm: str | None = None
    """Algorithm of a fresh draft: `eagle3`, `peagle`, `dflash`, `mtp`, or one of another package
    (group `speculators.models`); `eagle3` if neither it nor `start_from` is set."""
    draft_vocab_size: int | None = Field(None, ge=1)
    """Vocabulary size of a fresh draft: special tokens and the most frequent ones of the answers.
    If not set, 8,192 on a CPU for a verifier of more than 32,768 tokens, and the verifier's whole
    vocabulary otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _has_an_algorithm(cls, data: object) -> object:
        if isinstance(data, Mapping) and not (data.get("algorithm") or data.get("start_from")):
            return {**data, "algorithm": DEFAULT_ALGORITHM}
        return data


class PromptsConfig(Settings):
    """Prompts to answer, those to measure on, and the length of a document."""

    datasets: Annotated[
        tuple[DatasetConfig, ...], Several, Parameter(metavar="JSON..."), Field(min_length=1)
    ]
    """Data sets of prompts or conversations, whose answers are replaced by the verifier's; as flags
    each is JSON: `{"path": "prompts.jsonl"}`."""
    max_length: int | None = Field(None, ge=32)
    """Maximum number of tokens of a document, prompt and answers together; 2,048 or the verifier's
    positions, whichever is less, if not set. A draft is served best within it."""
    category: str = "category"
    """Column with the category of a prompt; the name of the data set where a row has none."""
    measured_per_category: int = Field(8, ge=1)
    """Prompts of each category to measure acceptance on instead of training on them, at most a
    tenth of the category but one of each with two or more."""
    min_trained_tokens: int = Field(1, ge=1)
    """Minimum number of tokens of an answer to train on."""


class BuildAnswersConfig(Settings):
    """The verifier's answers, which are kept as the token ids that it wrote."""

    engine: str | None = None
    """`openai` (a server), `vllm` or `transformers` (in this process), or one of another package
    (group `speculators.answerers`). If not set, `openai` with `base_url`, else `vllm` where it is
    installed and `transformers` where it is not."""
    max_failures: int = Field(100, ge=0)
    """Maximum number of conversations that may fail to be answered; one more ends the build."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of the answers."""
    endpoint: EndpointConfig = EndpointConfig()
    """Server with OpenAI's API, for engine `openai`."""
    offline: OfflineConfig = OfflineConfig()
    """Verifier in this process, for engine `vllm` or `transformers`."""


class BuildRunConfig(TrainRunConfig):
    """Duration, precision and output of the build."""

    output: Path
    """Folder of the build, with a folder for each stage; `speculator` in it is the result."""
    epochs: float = Field(3.0, gt=0)
    """Passes over the data, if `max_steps` is not set."""
    shard_tokens: int = Field(65_536, ge=1)
    """Tokens of a shard of hidden states, the most that is generated again after a stop."""
    eval_examples: int = Field(64, ge=0)
    """Examples to hold out for evaluation, at most a tenth of all."""


class BuildPlan(Settings):
    """Everything that decides a build."""

    model: BuildModelConfig
    prompts: PromptsConfig
    answers: BuildAnswersConfig = BuildAnswersConfig()
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: BuildRunConfig

    @model_validator(mode="after")
    def _no_option_is_idle(self) -> Self:
        if self.evaluation.prompts is not None:
            because = "evaluation.prompts names the prompts to measure on"
            self.prompts.refuse_idle("measured_per_category", because=because)
        if not self.evaluation.decode:
            because = "evaluation.decode is false"
            self.prompts.refuse_idle("measured_per_category", because=because)
        idle = ("max_length", "max_new_tokens", "temperature", "top_p")
        because = "the build reads whole documents; see prompts.max_length and answers.sampling"
        self.engine.refuse_idle(*idle, because=because)
        if self.run.deepspeed is not None:
            raise ValueError("run.deepspeed needs torchrun: run `speculators train` on its own")
        return self


def read_build_plan(
    file: Path | None, flags: Mapping[str, Settings | None] | None = None
) -> BuildPlan:
    """The plan of a YAML file; options that are set as flags take precedence.

    Raises:
        SpeculatorError: the file cannot be read, or an option is unknown or out of bounds.
    """
    sections = read_sections(file, BuildPlan, flags or {})
    return BuildPlan.read(sections, "flags" if file is None else str(file))
