"""The KV connector that hands out hidden states.

vLLM's method ``extract_hidden_states`` keeps the states of chosen layers in a separate KV cache
group, so chunked prefill, prefix caching and preemption treat them as they treat keys and values.
This connector takes a request's states out when it has finished:

    scheduler   new request -> read its options    finished -> keep its blocks, answer with a path
                                                       |                       ^ free the blocks
    worker                                             save -> copy to the host, then the outbox

Written for vLLM 0.32 and 0.33. `settings` has the arguments and options with which it is used.
"""

import logging
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import JsonValue
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import AttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from speculators_core.errors import SpeculatorError, first_line
from speculators_vllm.hidden_states.courier import Courier, Save
from speculators_vllm.hidden_states.settings import (
    METHOD,
    FileSink,
    RequestedStates,
    StreamSink,
    check_layer_ids,
    name_for,
    path_for,
    read_request,
    read_sink,
)

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks

logger = logging.getLogger(__name__)

UNANSWERED = (
    RequestStatus.FINISHED_ABORTED,
    RequestStatus.FINISHED_IGNORED,
    RequestStatus.FINISHED_ERROR,
)
"""Status of ended requests for which no client waits."""
CACHE_LAYER = "cache_only_layers."
"""Part of the name of the layer that keeps the states, in vLLM's ExtractHiddenStatesModel."""


@dataclass(frozen=True)
class Saves(KVConnectorMetadata):
    """Message from the scheduler to the workers at each step."""

    saves: list[Save]
    is_idle: bool
    """The step runs no token."""


@dataclass(frozen=True)
class Ended(KVConnectorWorkerMetadata):
    """Message from the sending worker to the scheduler."""

    reasons: dict[str, str | None] = field(default_factory=dict)
    """Why the states of each request were lost; None where they were sent."""

    def aggregate(self, other: "KVConnectorWorkerMetadata") -> "Ended":
        assert isinstance(other, Ended)
        return Ended(self.reasons | other.reasons)


class Ledger:
    """The scheduler's records of which requests get states, and which keep their blocks.

    Every entry is removed with its request: by `finish` from ``requested``, by `release` from the
    rest.
    """

    def __init__(self, sink: FileSink | StreamSink, group: int, block_size: int) -> None:
        self.sink = sink
        self.group = group
        self.block_size = block_size
        self.requested: dict[str, RequestedStates | str] = {}
        """Options of unfinished requests; a string is the reason why a request gets no states."""
        self.answers: dict[str, dict[str, str]] = {}
        """Name and place of states that were requested and not yet sent."""
        self.saves: list[Save] = []
        self.keeping: set[str] = set()
        """Finished requests that keep their blocks."""

    def add(self, request: Request) -> None:
        """Reads a new request's options; an error in them fails this request's states alone."""
        try:
            requested = self._read(request)
            if requested is not None:
                self.answers[request.request_id] = self._place(request.request_id, requested.name)
                self.requested[request.request_id] = requested
        except (SpeculatorError, OSError, RuntimeError) as error:  # the latter two of the folder
            self.requested[request.request_id] = first_line(error)
            request.kv_transfer_params = None  # vLLM itself acts on some keys

    def _read(self, request: Request) -> RequestedStates | None:
        if request.sampling_params is None:
            return None
        requested = read_request(request.sampling_params, self.sink)
        if requested is None:
            return None
        if request.prompt_token_ids is None or request.prompt_is_token_ids is not None:
            raise SpeculatorError(
                "The prompt has embeddings, but hidden states need token ids. Send the prompt as "
                "text or token ids, or leave kv_transfer_params out."
            )
        if request.resumable:
            raise SpeculatorError(
                "The prompt is streamed, but hidden states need a whole prompt. Send it in one "
                "request."
            )
        if re.match(r"\d+_", request.request_id):  # as vLLM's ParentRequest names its samples
            raise SpeculatorError(
                "n is over 1, but hidden states need n=1: send one request per sample."
            )
        return requested

    def _place(self, request_id: str, chosen: str | None) -> dict[str, str]:
        name = chosen or name_for(request_id)
        if isinstance(self.sink, StreamSink):
            return {"name": name, "hidden_states_endpoint": self.sink.endpoint}
        path = path_for(self.sink.folder, name)
        if chosen and (path.exists() or any(a["name"] == name for a in self.answers.values())):
            raise SpeculatorError(
                f"name {name!r} is taken, by a file or by another request. Choose another name."
            )
        path.with_suffix(".error").unlink(missing_ok=True)  # of an earlier attempt
        return {"name": name, "hidden_states_path": str(path)}

    def finish(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, JsonValue] | None]:
        """Whether the blocks are kept, and the answer to the client."""
        request_id = request.request_id
        requested = self.requested.pop(request_id, None)
        if requested is None:
            return False, None
        if isinstance(requested, str):
            return False, {"error": requested}
        num_tokens = request.num_prompt_tokens
        if requested.extent == "all":
            num_tokens = max(num_tokens, request.num_tokens - 1)
        num_kept = len(block_ids) * self.block_size
        if request.status in UNANSWERED or num_kept < num_tokens:
            del self.answers[request_id]
            return False, {
                "error": f"Blocks of {num_kept} tokens are left, expected {num_tokens}: the "
                "request ended early. Send it again."
            }
        answer = self.answers[request_id]
        self.keeping.add(request_id)
        self.saves.append(
            Save(
                request_id,
                answer["name"],
                list(request.all_token_ids[:num_tokens]),
                request.num_prompt_tokens,
                block_ids[: -(-num_tokens // self.block_size)],
            )
        )
        return True, {**answer, "num_tokens": num_tokens}

    def take_saves(self) -> list[Save]:
        saves, self.saves = self.saves, []
        return saves

    def has_pending(self) -> bool:
        """Whether states of finished requests have yet to be sent."""
        return bool(self.answers.keys() - self.requested.keys())

    def release(self, copied: set[str], ended: dict[str, str | None]) -> None:
        """Frees the blocks of copied requests, and the names of those that ended."""
        self.keeping -= copied
        for request_id in ended:
            del self.answers[request_id]


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """Passes vLLM's calls to a `Ledger` in the scheduler and to a `Courier` in one worker."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """Raises:
        SpeculatorError: the settings are not those of `engine_arguments`, or the engine keeps
            hidden states in an unknown way.
        """
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.sink = read_sink(self._kv_transfer_config.kv_connector_extra_config)
        self.layer_ids = _layer_ids(vllm_config)
        self.courier: Courier | None = None
        self.ledger: Ledger | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.ledger = Ledger(self.sink, *_group_and_block_size(kv_cache_config))

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """The layout in which vLLM keeps the states of a token together."""
        return "LBNHC"

    def get_finished_count(self) -> int | None:
        """One worker sends. By default vLLM waits for all of them, and never frees the blocks."""
        return 1

    # The scheduler's calls.

    def on_new_request(self, request: Request) -> None:
        assert self.ledger is not None
        self.ledger.add(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        """Nothing is loaded."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self.ledger is not None
        return Saves(self.ledger.take_saves(), scheduler_output.total_num_scheduled_tokens == 0)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, JsonValue] | None]:
        assert self.ledger is not None
        return self.ledger.finish(request, block_ids)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, JsonValue] | None]:
        assert self.ledger is not None
        group = self.ledger.group
        return self.request_finished(request, block_ids[group] if group < len(block_ids) else [])

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        assert self.ledger is not None
        meta = connector_output.kv_connector_worker_meta
        self.ledger.release(
            connector_output.finished_sending or set(),
            meta.reasons if isinstance(meta, Ended) else {},
        )

    def has_pending_block_frees(self) -> bool:
        """Kept blocks will be freed: running requests wait for them instead of being preempted."""
        return self.ledger is not None and bool(self.ledger.keeping)

    def has_pending_push_work(self) -> bool:
        """Keeps the engine stepping until the last states are sent."""
        return self.ledger is not None and self.ledger.has_pending()

    # The worker's calls.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Makes this worker the sender if it is of rank 0 and holds the states."""
        # vLLM's models, which the scheduler's process does not need.
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        layers = get_layers_from_vllm_config(
            self._vllm_config,
            CacheOnlyAttentionLayer,  # type: ignore[type-abstract]  # looked up, never made
            list(kv_caches),
        )
        if not layers or get_tensor_model_parallel_rank() != 0:
            return
        if self.courier is not None:  # vLLM keeps one connector a process
            raise SpeculatorError(
                "Another engine in this process hands out hidden states, expected one. Shut it "
                "down first, or start this one in another process."
            )
        (layer,) = layers
        cache = kv_caches[layer]
        _, block_size = _group_and_block_size(self._kv_cache_config)
        if cache.dim() != 4 or cache.shape[1] != len(self.layer_ids) or block_size % cache.shape[2]:
            raise SpeculatorError(
                f"vLLM keeps hidden states as {list(cache.shape)}, expected "
                f"[blocks, {len(self.layer_ids)} layers, a divisor of {block_size}, hidden]. "
                "Install a version of vLLM that this package was tested with."
            )
        self.courier = Courier(cache, block_size, self.layer_ids, self.sink)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self.courier is None or not self.has_connector_metadata():
            return None, None
        meta = self._get_connector_metadata()
        assert isinstance(meta, Saves)
        return self.courier.step(meta.saves, meta.is_idle) or None, None

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        if self.courier is None:
            return None
        ended = self.courier.outbox.take_ended()
        return Ended(ended) if ended else None

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: object) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: AttentionMetadata, **kwargs: object
    ) -> None:
        """The states are copied when the request has finished."""

    def wait_for_save(self) -> None:
        """The blocks are kept until the copy is complete."""

    def shutdown(self) -> None:
        if self.courier is not None:
            self.courier.close()
            self.courier = None
        if self.ledger is not None and self.ledger.saves:
            logger.error(
                "hidden states of %d requests were lost: the engine was shut down before its next "
                "step. Call speculators_vllm.hidden_states.drain(llm) first.",
                len(self.ledger.saves),
            )


def drain(llm: "LLM", timeout_s: float = 60.0) -> None:
    """Steps a `vllm.LLM` until the states of all finished requests are sent.

    Needed where the engine runs inside this process, which steps it only while it generates. An
    engine in another process continues by itself.

    Raises:
        SpeculatorError: it took longer, for example because nobody receives.
    """
    from vllm.v1.engine.core_client import InprocClient  # the engine's processes need none

    client = llm.llm_engine.engine_core
    if not isinstance(client, InprocClient):
        return
    deadline = time.monotonic() + timeout_s
    while client.engine_core.scheduler.has_requests():
        if time.monotonic() > deadline:
            raise SpeculatorError(
                f"Hidden states were not sent within {timeout_s} s. Check that a receiver is bound "
                "to the sink's endpoint, or wait longer."
            )
        llm.llm_engine.step()


def _layer_ids(vllm_config: VllmConfig) -> tuple[int, ...]:
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if speculative is None or speculative.method != METHOD:
        found = "no speculative_config" if speculative is None else f"method {speculative.method!r}"
        raise SpeculatorError(
            f"{HiddenStatesConnector.__name__} found {found}, expected {METHOD!r}. Start vLLM with "
            "the arguments of speculators_vllm.hidden_states.engine_arguments."
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise SpeculatorError(
            "Context parallelism spreads a request's states over its workers, expected none. "
            "Start vLLM with context parallel sizes of 1."
        )
    return check_layer_ids(
        speculative.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids,
        vllm_config.model_config.get_total_num_hidden_layers(),
    )


def _group_and_block_size(kv_cache_config: KVCacheConfig) -> tuple[int, int]:
    """Index of the KV cache group of the states, and the number of tokens of its blocks.

    It is found by the layer's name: layers that are alike share a group, whatever its spec.
    """
    found = [
        (index, group.kv_cache_spec.block_size)
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
        if any(CACHE_LAYER in name for name in group.layer_names)
    ]
    if len(found) != 1:
        raise SpeculatorError(
            f"vLLM has {len(found)} KV cache groups of hidden states, expected 1. Install a "
            "version of vLLM that this package was tested with."
        )
    return found[0]
