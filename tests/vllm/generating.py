"""What the tests of data generation on vLLM share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from speculators_core.data_generation.engines.pipeline import schema_of
from speculators_core.data_generation.engines.transformers import TransformersPipeline
from speculators_core.data_generation.examples import Example, Failure, GeneratedExample
from speculators_core.data_generation.settings import GenerationPlan
from tests.conftest import make_verifier
from tests.vllm.serving import SMALL

END_ID = 17
WRITES = {"max_new_tokens": 40}
WRITTEN = {"tokens": "all", "layer_ids": (1, 2, 3)}
TOLERANCE = 1e-5


def write_verifier(folder: Path) -> Path:
    """One that ends some of its texts."""
    shape = SMALL | {"initializer_range": 0.05, "eos_token_id": END_ID}
    make_verifier(**shape).save_pretrained(folder)
    return folder


def plan_of(
    folder: Path,
    states: dict[str, Any] | None = None,
    roots: tuple[Path, ...] = (),
    seed: int = 0,
    **engine: Any,
) -> GenerationPlan:
    return GenerationPlan.model_validate(
        {
            "data": {
                "verifier": str(folder),
                "datasets": [{"path": "unread"}],
                "states": states or {"layer_ids": (1, 2, 3)},
            },
            "engine": {"name": "vllm", "dtype": "float32", "max_length": 300, **engine},
            "sync": {"path": "unwritten", "dtype": "float32"},
            "run": {"seed": seed, "allowed_roots": roots},
        }
    )


def examples_of(*lengths: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Example(
            key=f"{seed}-{i}",
            input_ids=torch.randint(20, 128, (length,), generator=generator),
            loss_mask=torch.rand(length, generator=generator) < 0.5,
        )
        for i, length in enumerate(lengths)
    ]


def with_transformers(
    plan: GenerationPlan, examples: Sequence[Example]
) -> list[GeneratedExample | Failure]:
    engine = {"name": "transformers", "base_url": None, "vllm": {}}
    plan = plan.model_copy(update={"engine": plan.engine.model_copy(update=engine)})
    with TransformersPipeline(plan, schema_of(plan)) as pipeline:
        return pipeline.run(examples)


def assert_same(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    assert [one.key for one in ours] == [one.key for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.loss_mask, other.loss_mask)
        assert one.num_prompt_tokens == other.num_prompt_tokens
        assert_close(one.hidden_states, other.hidden_states)
        if other.logits is None:
            assert one.logits is None and one.logit_ids is None
        else:
            assert_close(one.logits, other.logits)
        if other.logit_ids is not None:
            assert torch.equal(one.logit_ids, other.logit_ids)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < TOLERANCE * theirs.abs().max().clamp_min(1)
