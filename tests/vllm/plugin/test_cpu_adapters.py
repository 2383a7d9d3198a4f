"""On a CPU a request without a LoRA adapter stays without one."""

import inspect

import pytest
import torch

from speculators_vllm.plugin.cpu_adapters import sparing_tokens_without

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("name", "more"), [("bgmv_shrink", ()), ("bgmv_expand", (True,)), ("bgmv_expand_slice", (0, 4))]
)
def test_a_token_without_an_adapter_gets_nothing(name, more):
    from vllm.lora.ops.torch_ops import lora_ops

    original = inspect.unwrap(getattr(lora_ops, name))
    weights, inputs = torch.randn(2, 1, 4, 3), torch.randn(3, 3)
    adapters = torch.tensor([0, -1, 1])
    theirs, ours = torch.zeros(3, 4), torch.zeros(3, 4)
    original(inputs, weights, theirs, adapters, *more)
    sparing_tokens_without(original)(inputs, weights, ours, adapters, *more)
    assert theirs[1].any()  # vLLM's fault: the last adapter's
    assert not ours[1].any()
    assert torch.equal(ours[::2], theirs[::2])
