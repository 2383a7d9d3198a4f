"""Layers, sinks and options of requests for hidden states.

An engine gets layers and sink at its start (`engine_arguments`); a request chooses its tokens in
``kv_transfer_params`` (`RequestOptions`). This module does not import vLLM, so that an error in the
settings is found before anything heavy starts.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict

from pydantic import Field, JsonValue, TypeAdapter, ValidationError, field_validator
from transformers import PretrainedConfig

from speculators_core.errors import SpeculatorError, first_fault
from speculators_core.settings import Settings
from speculators_core.verifier.reading import read_verifier_config
from speculators_vllm.hidden_states import CONNECTOR_MODULE

if TYPE_CHECKING:
    from vllm import SamplingParams

METHOD = "extract_hidden_states"
"""vLLM's speculative method that keeps hidden states with its KV cache."""
CONNECTOR: dict[str, JsonValue] = {
    "kv_connector": "HiddenStatesConnector",
    "kv_connector_module_path": CONNECTOR_MODULE,
    "kv_role": "kv_producer",
}
SEGMENT = "[A-Za-z0-9_][A-Za-z0-9._-]*"
NAME = rf"^{SEGMENT}(/{SEGMENT})*$"
MAX_NAME_LENGTH = 200
ENDPOINT = "^(ipc|tcp)://.+"

Extent = Literal["none", "prompt", "all"]
"""The tokens of a request whose states are wanted; ``all`` are prompt and output tokens."""


class Sink(Settings):
    """Where hidden states go, and how many may be in flight."""

    by_default: Extent = "prompt"
    """Tokens whose states a request gets when it does not choose."""
    max_in_flight_bytes: int = Field(2**30, ge=1)
    """Host memory for states in flight; a single request may exceed it, alone. When it is full
    finished requests keep their KV blocks, and the engine pauses when it has none left."""
    linger_s: float = Field(30.0, ge=0)
    """Seconds that a shutdown waits for states in flight."""


class FileSink(Sink):
    """One safetensors file per request."""

    kind: Literal["files"] = "files"
    folder: Path
    """Folder of the files; nothing is written outside of it, nor over an existing file."""

    @field_validator("folder")
    @classmethod
    def _from_here(cls, folder: Path) -> Path:
        return folder.expanduser().absolute()


class StreamSink(Sink):
    """One ZeroMQ message per request, to a `HiddenStateReceiver`.

    Neither side authenticates the other: bind to a private address.
    """

    kind: Literal["stream"] = "stream"
    endpoint: str = Field(pattern=ENDPOINT)
    """Address at which the receiver is bound, ``ipc://path`` or ``tcp://host:port``."""


AnySink = Annotated[FileSink | StreamSink, Field(discriminator="kind")]
_SINK: TypeAdapter[FileSink | StreamSink] = TypeAdapter(AnySink)


def read_sink(extra_config: Mapping[str, object]) -> FileSink | StreamSink:
    """The sink that ``kv_connector_extra_config`` describes.

    Raises:
        SpeculatorError: a key is unknown or out of bounds.
    """
    try:
        return _SINK.validate_python(dict(extra_config))
    except ValidationError as error:
        raise SpeculatorError(
            f"kv_connector_extra_config: {first_fault(error)}; expected what "
            "speculators_vllm.hidden_states.engine_arguments writes there. Correct it."
        ) from error


def check_layer_ids(layer_ids: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The ids: k is the residual stream after k layers, 0 the embeddings.

    Raises:
        SpeculatorError: there are none, or they are not ascending, or not in 0..num_layers.
    """
    ids = tuple(layer_ids)
    rule = f"expected one or more ascending ids of 0..{num_layers}"
    if not ids or not all(type(i) is int and 0 <= i <= num_layers for i in ids):
        raise SpeculatorError(
            f"Layers {list(ids)} have no hidden states: {rule}. Correct layer_ids."
        )
    if list(ids) != sorted(set(ids)):
        raise SpeculatorError(
            f"Layer ids {list(ids)} are out of order or repeated: {rule}. Correct layer_ids."
        )
    return ids


class EngineArguments(TypedDict):
    """Arguments of `vllm.LLM`, and as JSON of ``vllm serve``."""

    speculative_config: dict[str, JsonValue]
    kv_transfer_config: dict[str, JsonValue]


def engine_arguments(
    verifier: str | PathLike[str] | PretrainedConfig,
    layer_ids: Sequence[int],
    sink: FileSink | StreamSink,
    *,
    with_last: bool = True,
) -> EngineArguments:
    """The arguments with which an engine sends states of these layers to the sink.

    ``with_last`` adds the last state (all layers, before the final norm) to ``layer_ids``.

    Raises:
        SpeculatorError: the verifier cannot be read, or an id is not one of its layers.
    """
    config = verifier if isinstance(verifier, PretrainedConfig) else read_verifier_config(verifier)
    num_layers = config.get_text_config().num_hidden_layers
    ids = check_layer_ids(layer_ids or ((num_layers,) if with_last else ()), num_layers)
    if with_last and ids[-1] != num_layers:
        ids = (*ids, num_layers)
    return {
        "speculative_config": {
            "method": METHOD,
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(ids)}},
        },
        "kv_transfer_config": {
            **CONNECTOR,
            "kv_connector_extra_config": sink.model_dump(mode="json"),
        },
    }


class RequestOptions(Settings):
    """``kv_transfer_params`` of a request."""

    hidden_states: Extent | None = None
    """Tokens whose states the request gets; the sink's default when absent. The last sampled
    token was never run through the verifier and has none."""
    name: str | None = Field(None, pattern=NAME, max_length=MAX_NAME_LENGTH)
    """Name of the file without ``.safetensors``, or in the stream; the request's id when absent."""


@dataclass(frozen=True)
class RequestedStates:
    """Options of a request that gets states."""

    extent: Literal["prompt", "all"]
    name: str | None


def read_request(parameters: "SamplingParams", sink: Sink) -> RequestedStates | None:
    """The states that a request asks for; None for none.

    Raises:
        SpeculatorError: the options are malformed, or the states could not be handed over.
    """
    options = RequestOptions()
    given = (parameters.extra_args or {}).get("kv_transfer_params")
    if given is not None:
        options = RequestOptions.read(_checked(given), "kv_transfer_params")
    extent = options.hidden_states or sink.by_default
    if extent == "none":
        return None
    if parameters.n > 1:
        raise SpeculatorError(
            f"n is {parameters.n}, but hidden states need n=1: send one request per sample."
        )
    if parameters.stop:
        # vLLM looks for them outside of the engine, which then treats the request as aborted.
        raise SpeculatorError("Hidden states and `stop` exclude each other: use `stop_token_ids`.")
    return RequestedStates(extent, options.name)


def _checked(given: object) -> Mapping[str, object]:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise SpeculatorError(
            f"kv_transfer_params: found {given!r:.80}, expected an object such as "
            '{"hidden_states": "all"}. Correct it.'
        )
    return given


def name_for(request_id: str) -> str:
    """A name that is safe in a path; clients can choose parts of the ids of requests."""
    if len(request_id) <= MAX_NAME_LENGTH and re.fullmatch(SEGMENT, request_id):
        return request_id
    return f"request-{hashlib.sha256(request_id.encode()).hexdigest()[:32]}"


def path_for(folder: Path, name: str) -> Path:
    """The file of this name.

    Raises:
        SpeculatorError: a link on the way leads out of the folder.
    """
    root = folder.resolve()
    parent = (root / name).parent.resolve()
    if not parent.is_relative_to(root):
        raise SpeculatorError(
            f"name {name!r} leads out of {folder}, to {parent}; expected one below it. Choose "
            "a name without links."
        )
    return parent / f"{Path(name).name}.safetensors"
