"""Hidden states that the tests of this folder write, send and compare."""

import torch

from speculators_vllm.hidden_states import HiddenStates


def record(num_tokens=3, name="a", dtype=torch.float32):
    return HiddenStates(
        request_id=f"id-{name}",
        name=name,
        layer_ids=(1, 4),
        num_prompt_tokens=2,
        token_ids=torch.arange(num_tokens),
        hidden_states=torch.randn(num_tokens, 2, 8).to(dtype),
    )


def assert_same(ours, theirs):
    assert torch.equal(ours.hidden_states, theirs.hidden_states)
    assert torch.equal(ours.token_ids, theirs.token_ids)
    for field in ("request_id", "name", "layer_ids", "num_prompt_tokens"):
        assert getattr(ours, field) == getattr(theirs, field)
