"""What data is generated, by which engine, where it goes and how it is run.

A YAML file holds the four sections, flags of the command line win over it:

    data:    {verifier: Qwen/Qwen3-8B, datasets: [{path: chats.jsonl}]}
    engine:  {name: vllm}
    sync:    {kind: disk, path: states}
    run:     {workers: 1}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from speculators_core.settings import Settings, read_sections

StoredDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]


class ColumnMapping(Settings):
    """Which column of a data set plays which part; the usual names where none are given.

    A row is what its columns make of it, in this order: token ids, a conversation, a prompt with
    its completion, or plain text.
    """

    input_ids: str = "input_ids"
    """Token ids; they pass through as they are."""
    loss_mask: str = "loss_mask"
    """1 for each token that a draft learns to propose; all of them where the column is missing."""
    messages: str | None = None
    """Conversation, a list of messages; `messages`, `conversations` or `conversation` if None."""
    tools: str = "tools"
    """Tools of a conversation, for its chat template."""
    prompt: str = "prompt"
    """Text before a completion."""
    completion: str | None = None
    """Text after a prompt; `completion` or `response` where None."""
    text: str = "text"
    """Plain text."""


class DatasetConfig(Settings):
    """One source of texts."""

    path: str = Field(min_length=1)
    """Hub id, a folder that `datasets` wrote or reads, or a file: JSONL, JSON, Parquet, Arrow, CSV
    or text (a line a row, or with `sample_by` as `datasets` has it)."""
    name: str | None = None
    """Of the configuration, where a hub data set has several."""
    split: str = "train"
    """Split, or a part of one: `train[:10%]`."""
    columns: ColumnMapping = Field(default_factory=ColumnMapping)
    """Which column plays which part."""
    limit: int | None = Field(None, ge=1)
    """Rows to read, at most."""
    streaming: bool | None = None
    """Reads rows as they come, without a copy on this machine; hub data sets where None."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What a row of a text file is."""


class StatesConfig(Settings):
    """What is kept of the verifier's work."""

    tokens: Literal["prompt", "all"] = "prompt"
    """Of the tokens that are given, or also of those that the verifier goes on to write."""
    layer_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Layers whose states are kept, ascending: k is the residual stream after k layers. EAGLE-3's
    three where None; `()` for none."""
    last: bool = True
    """Keeps the state after all layers, before the final norm, as well."""
    reduce: Literal["none", "mean"] = "none"
    """`mean` keeps one state a token, the mean over `layer_ids`, beside the last one."""
    logits: Literal["none", "top-k", "full"] = "none"
    """The verifier's logits, the highest or all."""
    top_k: int = Field(64, ge=1)
    """Logits a token with `top-k`."""


class DataGenConfig(Settings):
    """Which texts are run through which verifier, and what is kept of it."""

    verifier: str = Field(min_length=1)
    """Folder or hub id."""
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    """Sources, read one after another."""
    chat_template: str | None = None
    """Jinja template, a file that holds one, or the hub id of a tokenizer that has one; the
    verifier's own where None."""
    template_options: dict[str, JsonValue] = Field(default_factory=dict)
    """More variables of the chat template, such as `enable_thinking`."""
    tokenizer_options: dict[str, JsonValue] = Field(default_factory=dict)
    """Overrides of the tokenizer's (processor's) own settings, as `from_pretrained` takes them."""
    min_trained_tokens: int = Field(1, ge=0)
    """Rows with fewer tokens to learn are skipped, and counted."""
    deduplicate: bool = True
    """Skips rows whose token ids came before, and counts them."""
    states: StatesConfig = Field(default_factory=StatesConfig)
    """What is kept of the verifier's work."""
    trust_remote_code: bool = False
    """Runs code that the verifier's folder brings."""


class EngineConfig(Settings):
    """What runs the verifier."""

    name: str = "transformers"
    """`transformers`, `vllm`, or what another package registers in `speculators.engines`."""
    batch_size: int | None = Field(None, ge=1)
    """Texts that run through the verifier at one time; the engine's own number where None."""
    max_length: int = Field(2048, ge=2)
    """Tokens of an example, at most; what is longer is cut on the right."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the verifier; its own with `auto`."""
    device: str | None = None
    """`cuda`, `cuda:1` or `cpu`; a GPU where there is one if None. Workers share GPUs in turn."""
    max_new_tokens: int = Field(256, ge=1)
    """Tokens that the verifier writes, with `states.tokens: all`, at most."""
    temperature: float = Field(0.0, ge=0)
    """Of what the verifier writes; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Of what the verifier writes."""
    vllm: dict[str, JsonValue] = Field(default_factory=dict)
    """More arguments of vLLM's `LLM`."""
    base_url: str | None = Field(None, pattern="^https?://")
    """A vLLM server that hands out hidden states, instead of an engine in the process."""
    api_key: str | None = Field(None, exclude=True)
    """Of that server; `OPENAI_API_KEY` where None. Never written."""


class SyncConfig(Settings):
    """Where examples go."""

    kind: Literal["disk", "mp_queue", "zmq"] = "disk"
    """Shards in a folder, other processes of this machine, or other machines."""
    path: Path | None = None
    """Folder of the store; of a queue, where its progress is kept for `run.resume`."""
    shard_tokens: int = Field(65_536, ge=1)
    """Tokens of a shard, or of a unit of work; an example longer than that has one for itself."""
    dtype: StoredDtype = "bfloat16"
    """Of stored states and logits; of float8 states have a scale for each token, logits are
    bfloat16."""
    compression: Literal["none", "zstd"] = "none"
    """Of shards and messages; a compressed shard is not mapped into memory."""
    queue_size: int = Field(64, ge=1)
    """Examples that a consumer has not dealt with, at most, those in its row and shuffle buffer
    included; then the engine waits."""
    urls: tuple[Annotated[str, Field(pattern="^(tcp|ipc)://.+")], ...] = ()
    """Consumers of a queue, one each: `tcp://host:port` of zmq, and what a source of mp_queue says
    of itself."""
    max_message_bytes: int = Field(2**31, ge=1)
    """Larger messages are refused unread."""
    heartbeat_s: float = Field(5.0, gt=0)
    """A peer that is silent for three of them is taken for gone."""
    server_key: str | None = Field(None, min_length=40, max_length=40)
    """CURVE public key of the consumers, Z85; messages are then encrypted."""
    key_file: Path | None = None
    """Our own CURVE keys, a file of ZeroMQ's `curve_keygen`."""


class RunConfig(Settings):
    """How it is run."""

    workers: int = Field(1, ge=1)
    """Engines at one time, each in a process of its own if there are several."""
    backend: Literal["local", "ray"] = "local"
    """This machine, or a Ray cluster (`RAY_ADDRESS`, or one that Ray starts here)."""
    resume: bool = False
    """Goes on where an earlier run stopped; without it a store that is there is refused."""
    repair: bool = False
    """Makes damaged shards of a store on disk again, and those with examples set aside: the engine
    tries these once more."""
    limit: int | None = Field(None, ge=1)
    """Examples in all, at most."""
    max_failures: int = Field(100, ge=0)
    """Examples that may be set aside because the engine failed on them, in all runs of a store; one
    more ends the run. They are tried again with `repair` alone."""
    seed: int = Field(0, ge=0)
    """Of sampling."""
    allowed_roots: tuple[Path, ...] = ()
    """Folders below which local data are read and written, links resolved; where there are none,
    the current directory, the configuration's and the store."""
    log_file: Path | None = None
    """A line every 30 s; `generate.log` in the store where None."""

    @field_validator("allowed_roots")
    @classmethod
    def _in_full(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(root.expanduser().resolve() for root in roots)


class GenerationPlan(Settings):
    """All four sections."""

    data: DataGenConfig
    engine: EngineConfig = Field(default_factory=EngineConfig)
    sync: SyncConfig = Field(default_factory=SyncConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sync.kind == "disk" and self.sync.path is None:
            raise ValueError("sync.path is missing: the folder that the shards go to")
        if self.sync.kind != "disk" and not self.sync.urls:
            raise ValueError("sync.urls is missing: where the consumers of the queue are")
        if self.sync.kind != "disk" and self.sync.path is None and self.run.resume:
            raise ValueError("sync.path is missing: where an earlier run kept its journal")
        states = self.data.states
        if not states.last and states.layer_ids == () and states.logits == "none":
            raise ValueError("data.states keeps nothing: no layer, not the last state, no logits")
        return self


def read_plan(
    file: Path | None, flags: Mapping[str, Settings | None] | None = None
) -> GenerationPlan:
    """The plan of a YAML file, with the options that flags set in their place.

    ``flags`` are sections by name; what was not set in them counts as absent.

    Raises:
        SpeculatorError: the file cannot be read, or an option is unknown or out of bounds.
    """
    sections = read_sections(file, GenerationPlan, flags or {})
    return GenerationPlan.read(sections, "flags" if file is None else str(file))
