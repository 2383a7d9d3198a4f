"""Small examples, schemas and verifiers that the tests of data generation share."""

import torch

from speculators_core.data_generation.examples import Example, GeneratedExample, Schema
from tests.conftest import VOCAB_SIZE

HIDDEN_SIZE = 8


def schema(**overrides) -> Schema:
    content = {
        "verifier": "tiny",
        "layer_ids": (1, 2, 4),
        "has_last": True,
        "hidden_size": HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
        "dtype": "float32",
    }
    return Schema(**content | overrides)


def generated(number: int, num_tokens: int, of: Schema) -> GeneratedExample:
    """The same for the same number."""
    draw = torch.Generator().manual_seed(number)
    tails = {name: spec.tail for name, spec in of.fields.items()}
    logits = (
        torch.randn(num_tokens, *tails["logits"], generator=draw) if "logits" in tails else None
    )
    ids = (
        torch.randint(of.vocab_size, (num_tokens, *tails["logit_ids"]), generator=draw)
        if "logit_ids" in tails
        else None
    )
    return GeneratedExample(
        key=f"0/{number}",
        input_ids=torch.randint(of.vocab_size, (num_tokens,), generator=draw),
        loss_mask=torch.rand(num_tokens, generator=draw) > 0.5,
        num_prompt_tokens=max(1, num_tokens - 2),
        hidden_states=torch.randn(num_tokens, of.num_states, of.hidden_size, generator=draw).to(
            of.real_dtype
        ),
        logits=None if logits is None else logits.to(of.real_dtype),
        logit_ids=ids,
    )


def example(number: int, num_tokens: int) -> Example:
    draw = torch.Generator().manual_seed(number)
    return Example(
        key=f"0/{number}",
        input_ids=torch.randint(VOCAB_SIZE, (num_tokens,), generator=draw),
        loss_mask=torch.ones(num_tokens, dtype=torch.bool),
    )


def assert_same(found: GeneratedExample, expected: GeneratedExample) -> None:
    assert found.key == expected.key
    assert found.num_prompt_tokens == expected.num_prompt_tokens
    for name in ("input_ids", "loss_mask", "hidden_states", "logits", "logit_ids"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype and torch.equal(one, other), name
