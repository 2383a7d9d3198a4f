"""Settings of data generation, in four sections.

They are the sections of a YAML file; flags of the command line take precedence:

    data:    {verifier: Qwen/Qwen3-8B, datasets: [{path: chats.jsonl}]}
    engine:  {name: vllm}
    sync:    {kind: disk, path: states}
    run:     {workers: 1}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from cyclopts import Parameter
from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)

from speculators_core.errors import SpeculatorError
from speculators_core.files import in_full
from speculators_core.flags import JsonOptions, Several, Switch
from speculators_core.settings import Settings, read_sections

StoredDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
}
"""Suffixes of files, and what `datasets` reads them with."""


class ColumnMapping(Settings):
    """Columns of a data set.

    The first of these that a row has decides what it is: token ids, a conversation, a prompt with
    its completion, plain text.
    """

    input_ids: str = "input_ids"
    """Column of token ids, which are used as is."""
    loss_mask: str = "loss_mask"
    """Column with 1 for each token to train on; all tokens if there is no such column."""
    messages: str | None = None
    """Column of conversations (lists of messages); `messages`, `conversations` or `conversation` if
    not set."""
    tools: str = "tools"
    """Column of a conversation's tools, for the chat template."""
    prompt: str = "prompt"
    """Column of prompts."""
    completion: str | None = None
    """Column of completions; `completion` or `response` if not set."""
    text: str = "text"
    """Column of plain text."""


class DatasetConfig(Settings):
    """A data set and its columns."""

    path: str = Field(min_length=1)
    """Hub id, folder written or read by `datasets`, or file (JSONL, JSON, Parquet, Arrow, CSV or
    text)."""
    name: str | None = None
    """Configuration of a hub data set that has several."""
    split: str = "train"
    """Split, or part of one: `train[:10%]`."""
    columns: ColumnMapping = Field(default_factory=ColumnMapping)
    """Columns of the data set."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of rows to read."""
    streaming: bool | None = None
    """Stream the rows instead of downloading the data set first; hub data sets are streamed if not
    set."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """Unit of a text file that makes a row."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_path(cls, stated: object) -> object:
        return {"path": stated} if isinstance(stated, str) else stated

    def local_path(self) -> Path | None:
        """The absolute path of a local data set; None for one of the hub.

        Raises:
            SpeculatorError: it is local and does not exist.
        """
        given = Path(self.path).expanduser()
        if not (given.exists() or given.suffix in FORMATS or self.path[0] in "/.~"):
            return None
        path = in_full(given)
        if not path.exists():
            raise SpeculatorError(
                f"{self.path}: no such file or folder, named as a data set's `path`. Correct it, "
                "or name a data set of the hub."
            )
        return path


class StatesConfig(Settings):
    """What is stored of the verifier's forward passes."""

    tokens: Literal["prompt", "all"] = "prompt"
    """Tokens to store: the text (`prompt`), or the text and the verifier's continuation (`all`)."""
    layer_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, Several] = None
    """Aux hidden states to store, in ascending order: k is the residual stream after k layers. The
    three layers of EAGLE-3 if not set; an empty list for none."""
    last: bool = True
    """Also store the hidden state after the last layer, before the final norm."""
    reduce: Literal["none", "mean"] = "none"
    """`mean` stores the mean over `layer_ids` instead of each of them."""
    logits: Literal["none", "top-k", "full"] = "none"
    """Logits of the verifier to store: none, the `top_k` highest or all."""
    top_k: int = Field(64, ge=1)
    """Logits to store per token with `logits: top-k`."""


class DataGenConfig(Settings):
    """Texts, the verifier that reads them, and what is stored."""

    verifier: str = Field(min_length=1)
    """Folder or hub id of the verifier. From Python also a loaded model, which then runs on engine
    `transformers` in this process."""
    datasets: Annotated[
        tuple[DatasetConfig, ...],
        Several,
        Parameter(metavar="STR|JSON..."),
        Field(min_length=1),
    ]
    """Data sets, read one after another: each a path or hub id, or JSON with further options
    (`{"path": "chats.jsonl", "limit": 100}`)."""
    chat_template: str | None = None
    """Jinja template, file that holds one, or hub id of a tokenizer that has one; the verifier's
    template if not set."""
    template_options: JsonOptions = Field(default_factory=dict)
    """Further variables of the chat template, such as `enable_thinking`."""
    tokenizer_options: JsonOptions = Field(default_factory=dict)
    """Arguments of `from_pretrained` for the tokenizer or processor."""
    min_trained_tokens: int = Field(1, ge=0)
    """Minimum number of tokens to train on; rows with fewer are skipped and counted."""
    deduplicate: bool = True
    """Skip and count rows whose token ids have occurred before."""
    states: StatesConfig = Field(default_factory=StatesConfig)
    """What is stored of the verifier's forward passes."""
    trust_remote_code: bool = False
    """Run Python code from the verifier's folder."""
    _model: object | None = PrivateAttr(None)

    @property
    def model(self) -> object | None:
        """The loaded verifier, if one was given; its files are those of `verifier`."""
        return self._model

    @model_validator(mode="wrap")
    @classmethod
    def _takes_a_model(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        given = data.get("verifier") if isinstance(data, Mapping) else None
        name = getattr(given, "name_or_path", None)
        if not isinstance(data, Mapping) or name is None:
            return handler(data)
        if not name:
            raise ValueError(
                f"verifier: this {type(given).__name__} was not loaded from a folder or hub id, so "
                "it has no tokenizer. Save both to a folder and load it from there"
            )
        found = handler({**data, "verifier": name})
        found._model = given
        return found


class EngineConfig(Settings):
    """Engine that runs the verifier."""

    name: str = "transformers"
    """`transformers`, `vllm`, or an engine of another package (group `speculators.engines`)."""
    batch_size: int | None = Field(None, ge=1)
    """Texts per forward pass; the engine's default if not set."""
    max_length: int = Field(2048, ge=2)
    """Maximum number of tokens of an example; longer ones are cut on the right."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the verifier; `auto` is that of its checkpoint."""
    device: str | None = None
    """Device of the verifier: `cuda`, `cuda:1` or `cpu`. If not set, a GPU where there is one;
    several workers are spread over all GPUs."""
    device_map: str | dict[str, int | str] | None = None
    """How Transformers spreads a verifier over several devices, instead of `device`: `auto`,
    `balanced`, or a mapping of modules to devices."""
    max_new_tokens: int = Field(256, ge=1)
    """Maximum number of tokens that the verifier writes, with `states.tokens: all`."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the verifier's continuations; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling of the verifier's continuations: probability mass to sample from."""
    vllm: JsonOptions = Field(default_factory=dict)
    """Further arguments of vLLM's `LLM`, as JSON or as single flags
    (`--engine.vllm.max-num-seqs 64`)."""
    base_url: str | None = Field(None, pattern="^https?://")
    """URL of a vLLM server that hands out hidden states, instead of an engine in this process."""
    api_key: str | None = Field(None, exclude=True)
    """API key of that server; the variable `OPENAI_API_KEY` if not set. Never written to disk."""

    @model_validator(mode="after")
    def _has_one_placement(self) -> Self:
        if self.device_map is not None:
            self.refuse_idle("device", because="engine.device_map places the verifier")
            if self.name == "vllm":
                raise ValueError(
                    "device_map is for engine transformers; with vLLM set "
                    "engine.vllm.tensor-parallel-size"
                )
        return self


class SyncConfig(Settings):
    """Destination of the examples."""

    kind: Literal["disk", "mp_queue", "zmq"] = "disk"
    """`disk` (shards in a folder), `mp_queue` (processes on this machine) or `zmq` (anywhere)."""
    path: Path | None = None
    """Folder of the store. For a queue, folder of its journal, which `run.resume` needs."""
    shard_tokens: int = Field(65_536, ge=1)
    """Tokens of a shard, or of a unit of work; a longer example fills a shard alone."""
    dtype: StoredDtype = "bfloat16"
    """Dtype of stored states and logits. With float8, states have a scale per token and logits are
    bfloat16."""
    compression: Literal["none", "zstd"] = "none"
    """Compression of shards and messages. Compressed shards cannot be mapped into memory."""
    queue_size: int = Field(64, ge=1)
    """Maximum number of examples that a consumer has not acknowledged, those in its row and shuffle
    buffer included; beyond it the engine pauses."""
    urls: Annotated[
        tuple[Annotated[str, Field(pattern="^(tcp|ipc)://.+")], ...],
        Several,
    ] = ()
    """Addresses of the queue's consumers: `tcp://host:port` with `zmq`, the address that the source
    reports with `mp_queue`."""
    max_message_bytes: int = Field(2**31, ge=1)
    """Maximum size of a message; larger ones are refused unread."""
    heartbeat_s: float = Field(5.0, gt=0)
    """Interval of heartbeats; a peer that misses three is considered gone."""
    server_key: str | None = Field(None, min_length=40, max_length=40)
    """CURVE public key of the consumers (Z85), which encrypts the messages."""
    key_file: Path | None = None
    """File with the CURVE keys of this side, as written by ZeroMQ's `curve_keygen`."""


class RunConfig(Settings):
    """Workers, limits and resumption."""

    workers: int = Field(1, ge=1)
    """Number of engines; several run in a process each."""
    backend: Literal["local", "ray"] = "local"
    """`local` (this machine) or `ray` (the cluster at `RAY_ADDRESS`, or one started here)."""
    resume: bool = False
    """Resume an earlier run. Without it, an existing store is refused."""
    repair: bool = False
    """Generate damaged shards of a store again, and those with examples set aside, which the engine
    retries."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of examples."""
    max_failures: int = Field(100, ge=0)
    """Maximum number of examples that the engine may fail on, over all runs of a store; one more
    ends the run. Failed examples are set aside and retried with `repair` only."""
    seed: int = Field(0, ge=0)
    """Seed for sampling."""
    allowed_roots: Annotated[tuple[Path, ...], Several] = ()
    """Folders below which data and a server may name files, such as by links; the current
    directory, the configuration's folder and the store if not set. Paths in the configuration and
    in flags may lie anywhere."""
    log_file: Path | None = None
    """Log file, with a line every 30 s; `generate.log` in the store if not set."""
    verbose: Annotated[bool, Switch] = False
    """Print vLLM's output while it starts, instead of writing it to a log file."""

    @field_validator("allowed_roots")
    @classmethod
    def _in_full(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(root.expanduser().resolve() for root in roots)


class GenerationPlan(Settings):
    """Everything that decides a run of data generation."""

    data: DataGenConfig
    engine: EngineConfig = Field(default_factory=EngineConfig)
    sync: SyncConfig = Field(default_factory=SyncConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sync.kind == "disk" and self.sync.path is None:
            raise ValueError(
                "sync.path is missing, which sync.kind disk requires: set it to the folder for the "
                "shards"
            )
        if self.sync.kind != "disk" and not self.sync.urls:
            raise ValueError(
                f"sync.urls is missing, which sync.kind {self.sync.kind} requires: set it to the "
                "URLs of the queue's consumers"
            )
        if self.sync.kind != "disk" and self.sync.path is None and self.run.resume:
            raise ValueError(
                "sync.path is missing, which run.resume requires: set it to the folder with the "
                "earlier run's journal"
            )
        states = self.data.states
        if not states.last and states.layer_ids == () and states.logits == "none":
            raise ValueError(
                "data.states keeps nothing: expected layer_ids, last or logits; set one of them"
            )
        return self


def read_plan(
    file: Path | None, flags: Mapping[str, Settings | None] | None = None
) -> GenerationPlan:
    """The plan of a YAML file; options that are set as flags take precedence.

    Raises:
        SpeculatorError: the file cannot be read, or an option is unknown or out of bounds.
    """
    sections = read_sections(file, GenerationPlan, flags or {})
    return GenerationPlan.read(sections, "flags" if file is None else str(file))
