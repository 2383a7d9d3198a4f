import asyncio
from types import SimpleNamespace

import pytest
from vllm import PoolingParams, SamplingParams
from vllm.exceptions import VLLMValidationError

from speculators_vllm.hidden_states import CONNECTOR_MODULE
from speculators_vllm.plugin.server_requests import checking


class Server:
    """The part of vLLM's AsyncLLM that the wrapper uses."""

    def __init__(self, module, folder):
        kv_transfer = SimpleNamespace(
            kv_connector_module_path=module,
            kv_connector_extra_config={"kind": "files", "folder": str(folder)},
        )
        self.vllm_config = SimpleNamespace(kv_transfer_config=kv_transfer if module else None)

    async def add_request(self, request_id, prompt, params, priority=0):
        return request_id, priority

    add_request = checking(add_request)


@pytest.mark.parametrize(
    ("module", "options", "refused"),
    [
        (CONNECTOR_MODULE, {"hidden_states": "all"}, False),
        (CONNECTOR_MODULE, {"hidden_state": "all"}, True),
        (CONNECTOR_MODULE, {"name": "../out"}, True),
        (CONNECTOR_MODULE, "all", True),
        ("another.connector", {"hidden_state": "all"}, False),
        (None, {"hidden_state": "all"}, False),
    ],
)
def test_server_refuses_a_malformed_request_alone(tmp_path, module, options, refused):
    parameters = SamplingParams(extra_args={"kv_transfer_params": options})
    asked = Server(module, tmp_path).add_request("one", "text", parameters, priority=2)
    if refused:
        with pytest.raises(VLLMValidationError, match="kv_transfer_params: "):
            asyncio.run(asked)
    else:
        assert asyncio.run(asked) == ("one", 2)


def test_requests_without_sampling_are_passed_on(tmp_path):
    asked = Server(CONNECTOR_MODULE, tmp_path).add_request("one", "text", PoolingParams())
    assert asyncio.run(asked) == ("one", 0)
