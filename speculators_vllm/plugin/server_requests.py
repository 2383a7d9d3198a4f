"""Wrapper that refuses malformed requests for hidden states."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from speculators_core.errors import SpeculatorError
from speculators_vllm.hidden_states import CONNECTOR_MODULE
from speculators_vllm.hidden_states.settings import read_request, read_sink

if TYPE_CHECKING:
    from vllm import PoolingParams
    from vllm.v1.engine.async_llm import AsyncLLM

Rest = ParamSpec("Rest")
Output = TypeVar("Output")
AddRequest = Callable[
    Concatenate["AsyncLLM", str, object, "SamplingParams | PoolingParams", Rest], Awaitable[Output]
]


def checking(original: AddRequest[Rest, Output]) -> AddRequest[Rest, Output]:
    """A server answers HTTP 400 where ``kv_transfer_params`` are malformed."""

    async def add_request(
        self: "AsyncLLM",
        request_id: str,
        prompt: object,
        params: "SamplingParams | PoolingParams",
        *args: Rest.args,
        **kwargs: Rest.kwargs,
    ) -> Output:
        kv_transfer = self.vllm_config.kv_transfer_config
        if (
            kv_transfer is not None
            and kv_transfer.kv_connector_module_path == CONNECTOR_MODULE
            and isinstance(params, SamplingParams)
        ):
            try:
                read_request(params, read_sink(kv_transfer.kv_connector_extra_config))
            except SpeculatorError as error:
                raise VLLMValidationError(str(error), parameter="kv_transfer_params") from error
        return await original(self, request_id, prompt, params, *args, **kwargs)

    return add_request
