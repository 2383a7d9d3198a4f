"""The KV connector that hands hidden states out of vLLM.

vLLM's method ``extract_hidden_states`` keeps the states of chosen layers in a KV cache group of
their own, so chunked prefill, prefix caching and preemption treat them as they treat keys and
values. This connector takes a request's states out when it has finished:

    scheduler   new request -> read its options    finished -> keep its blocks, answer with a path
                                                       |                       ^ free the blocks
    worker                                             save -> copy to the host, then the outbox

Written for vLLM 0.32 and 0.33. `settings` says how it is asked for.
"""

import logging
import re
import time
from dataclasses import dataclass, field
from typing import Any

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
from vllm.v1.request import RequestStatus

from speculators_core.errors import SpeculatorError, first_line
from speculators_vllm.hidden_states.courier import Courier, Save
from speculators_vllm.hidden_states.settings import (
    METHOD,
    FileSink,
    StreamSink,
    Wanted,
    check_layer_ids,
    name_for,
    path_for,
    read_request,
    read_sink,
)

logger = logging.getLogger(__name__)

UNANSWERED = (
    RequestStatus.FINISHED_ABORTED,
    RequestStatus.FINISHED_IGNORED,
    RequestStatus.FINISHED_ERROR,
)
"""Ends of a request for which nobody waits."""
CACHE_LAYER = "cache_only_layers."
"""In the name of the layer that keeps the states, in vLLM's ExtractHiddenStatesModel."""


@dataclass(frozen=True)
class Saves(KVConnectorMetadata):
    """From the scheduler to the workers, each step."""

    saves: list[Save]
    is_idle: bool
    """The step runs no token."""


@dataclass(frozen=True)
class Ended(KVConnectorWorkerMetadata):
    """From the worker that sends to the scheduler: requests whose states left, or why not."""

    reasons: dict[str, str | None] = field(default_factory=dict)

    def aggregate(self, other: "KVConnectorWorkerMetadata") -> "Ended":
        assert isinstance(other, Ended)
        return Ended(self.reasons | other.reasons)


class Ledger:
    """The scheduler's half: who wants what, and whose blocks are kept for it.

    Every entry goes with its request: `finish` ends the wish, `settle` the rest.
    """

    def __init__(self, sink: FileSink | StreamSink, group: int, block_size: int) -> None:
        self.sink = sink
        self.group = group
        self.block_size = block_size
        self.wishes: dict[str, Wanted | str] = {}
        """What unfinished requests asked for; a string is why they get nothing."""
        self.answers: dict[str, dict[str, Any]] = {}
        """Name and place of states that are wanted or on their way."""
        self.saves: list[Save] = []
        self.keeping: set[str] = set()
        """Requests that are done but keep their blocks."""

    def add(self, request: Any) -> None:
        """Reads a new request's options; a mistake in them is its own."""
        try:
            wanted = self._read(request)
            if wanted is not None:
                self.answers[request.request_id] = self._place(request.request_id, wanted.name)
                self.wishes[request.request_id] = wanted
        except (SpeculatorError, OSError, RuntimeError) as error:  # the latter two of the folder
            self.wishes[request.request_id] = first_line(error)
            request.kv_transfer_params = None  # vLLM itself acts on some keys

    def _read(self, request: Any) -> Wanted | None:
        if request.sampling_params is None:
            return None
        wanted = read_request(request.sampling_params, self.sink)
        if wanted is None:
            return None
        if request.prompt_token_ids is None or request.prompt_is_token_ids is not None:
            raise SpeculatorError("Hidden states are of token ids, the prompt is of embeddings.")
        if request.resumable:
            raise SpeculatorError("Hidden states are of one prompt, this one is streamed in.")
        if re.match(r"\d+_", request.request_id):  # as vLLM's ParentRequest names its samples
            raise SpeculatorError("Hidden states are of one sample, n is over 1.")
        return wanted

    def _place(self, request_id: str, chosen: str | None) -> dict[str, Any]:
        name = chosen or name_for(request_id)
        if isinstance(self.sink, StreamSink):
            return {"name": name, "hidden_states_endpoint": self.sink.endpoint}
        path = path_for(self.sink.folder, name)
        if chosen and (path.exists() or any(a["name"] == name for a in self.answers.values())):
            raise SpeculatorError(f"name {name!r} is taken, by a file or by another request.")
        path.with_suffix(".error").unlink(missing_ok=True)  # of an earlier attempt
        return {"name": name, "hidden_states_path": str(path)}

    def finish(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks are kept, and the answer to the client."""
        request_id = request.request_id
        wanted = self.wishes.pop(request_id, None)
        if wanted is None:
            return False, None
        if isinstance(wanted, str):
            return False, {"error": wanted}
        num_tokens = request.num_prompt_tokens
        if wanted.extent == "all":
            num_tokens = max(num_tokens, request.num_tokens - 1)
        num_kept = len(block_ids) * self.block_size
        if request.status in UNANSWERED or num_kept < num_tokens:
            del self.answers[request_id]
            return False, {"error": f"Blocks for {num_kept} of {num_tokens} tokens are left."}
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
        """Whether states of finished requests have yet to leave."""
        return bool(self.answers.keys() - self.wishes.keys())

    def settle(self, copied: set[str], ended: dict[str, str | None]) -> None:
        """Copied requests give their blocks back; those that ended, their names."""
        self.keeping -= copied
        for request_id in ended:
            del self.answers[request_id]


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's calls, passed on to a `Ledger` in the scheduler and to a `Courier` in one worker."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any
    ) -> None:
        """Raises:
        SpeculatorError: the settings are not those of `engine_arguments`, or the engine is
            one that keeps hidden states in a way unknown here.
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
        """The one in which vLLM keeps the states of a token together."""
        return "LBNHC"

    def get_finished_count(self) -> int | None:
        """One worker sends. By default all are waited for, and the blocks never come back."""
        return 1

    # The scheduler's calls.

    def on_new_request(self, request: Any) -> None:
        assert self.ledger is not None
        self.ledger.add(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing comes in."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self.ledger is not None
        return Saves(self.ledger.take_saves(), scheduler_output.total_num_scheduled_tokens == 0)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self.ledger is not None
        return self.ledger.finish(request, block_ids)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self.ledger is not None
        group = self.ledger.group
        return self.request_finished(request, block_ids[group] if group < len(block_ids) else [])

    def update_connector_output(self, connector_output: Any) -> None:
        assert self.ledger is not None
        meta = connector_output.kv_connector_worker_meta
        self.ledger.settle(
            connector_output.finished_sending or set(),
            meta.reasons if isinstance(meta, Ended) else {},
        )

    def has_pending_block_frees(self) -> bool:
        """Kept blocks come back: running requests wait for them instead of being preempted."""
        return self.ledger is not None and bool(self.ledger.keeping)

    def has_pending_push_work(self) -> bool:
        """Keeps the engine stepping until the last states have left."""
        return self.ledger is not None and self.ledger.has_pending()

    # The worker's calls.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Makes this worker the sender if it is of rank 0 and holds the states."""
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        layers: dict[str, Any] = get_layers_from_vllm_config(
            self._vllm_config,
            CacheOnlyAttentionLayer,  # type: ignore[type-abstract]
            list(kv_caches),
        )
        if not layers or get_tensor_model_parallel_rank() != 0:
            return
        if self.courier is not None:  # vLLM keeps one connector a process
            raise SpeculatorError("Another engine in this process hands out hidden states.")
        (layer,) = layers
        cache = kv_caches[layer]
        _, block_size = _group_and_block_size(self._kv_cache_config)
        if cache.dim() != 4 or cache.shape[1] != len(self.layer_ids) or block_size % cache.shape[2]:
            raise SpeculatorError(
                f"vLLM keeps hidden states as {list(cache.shape)}, expected "
                f"[blocks, {len(self.layer_ids)} layers, a divisor of {block_size}, hidden]."
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

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing comes in."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing comes in."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """The states are taken when the request has finished."""

    def wait_for_save(self) -> None:
        """The blocks are kept until the copy has arrived."""

    def shutdown(self) -> None:
        if self.courier is not None:
            self.courier.close()
            self.courier = None
        if self.ledger is not None and self.ledger.saves:
            logger.error(
                "hidden states of %d requests were lost: the engine was shut down before its next "
                "step. Call speculators_vllm.hidden_states.connector.drain(llm) first.",
                len(self.ledger.saves),
            )


def drain(llm: Any, timeout_s: float = 60.0) -> None:
    """Lets a `vllm.LLM` hand over the states of what it has generated.

    Needed where the engine runs inside this process, which steps it only while it generates.
    An engine in a process of its own goes on by itself.

    Raises:
        SpeculatorError: it took longer, for example because nobody receives.
    """
    client = llm.llm_engine.engine_core
    if not hasattr(client, "engine_core"):
        return
    deadline = time.monotonic() + timeout_s
    while client.engine_core.scheduler.has_requests():
        if time.monotonic() > deadline:
            raise SpeculatorError(f"Hidden states were not handed over within {timeout_s} s.")
        llm.llm_engine.step()


def _layer_ids(vllm_config: VllmConfig) -> tuple[int, ...]:
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if speculative is None or speculative.method != METHOD:
        raise SpeculatorError(f'{HiddenStatesConnector.__name__} needs the method "{METHOD}".')
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise SpeculatorError("Context parallelism spreads a request's states over its workers.")
    return check_layer_ids(
        speculative.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids,
        vllm_config.model_config.get_total_num_hidden_layers(),
    )


def _group_and_block_size(kv_cache_config: Any) -> tuple[int, int]:
    """Where the states lie among the KV cache groups, and how many tokens a block of it has.

    By the layer's name: where all layers are alike they share a group, and its spec is of any.
    """
    found = [
        (index, group.kv_cache_spec.block_size)
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
        if any(CACHE_LAYER in name for name in group.layer_names)
    ]
    if len(found) != 1:
        raise SpeculatorError(f"vLLM has {len(found)} KV cache groups of hidden states, not 1.")
    return found[0]
