"""Plans, texts and random states to measure with."""

import torch
from pydantic import JsonValue

from benchmarks.data_generation.settings import DataBenchmarkConfig
from benchmarks.playground import VERIFIER
from benchmarks.playground.corpus import read_library
from speculators_core.data_generation.examples import Example, GeneratedExample, Schema
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.verifier.reading import read_tokenizer


def make_plan(settings: DataBenchmarkConfig, **sections: dict[str, JsonValue]) -> GenerationPlan:
    """A plan of this verifier; options of ``sections`` win."""
    content: dict[str, dict[str, JsonValue]] = {
        "data": {"verifier": settings.verifier or str(VERIFIER), "datasets": [{"path": "none"}]},
        "engine": {"max_length": settings.length, "dtype": settings.dtype},
        "sync": {"path": "none"},
    }
    for name, options in sections.items():
        content[name] = content.get(name, {}) | options
    return GenerationPlan.read(content, "benchmark")


def make_texts(settings: DataBenchmarkConfig, count: int) -> list[Example]:
    """Pieces of the standard library, each of ``length`` tokens."""
    tokenizer = read_tokenizer(make_plan(settings).data.verifier)
    ids: list[int] = []
    for file in read_library():
        ids += tokenizer(file.text)["input_ids"]
        if len(ids) >= count * settings.length:
            break
    rows = torch.tensor(ids[: count * settings.length]).view(count, settings.length)
    mask = torch.ones(settings.length, dtype=torch.bool)
    return [Example(f"0/{number}", row, mask) for number, row in enumerate(rows)]


def make_examples(
    settings: DataBenchmarkConfig, length: int = 1024
) -> tuple[Schema, list[GeneratedExample]]:
    """Random states that fill one shard."""
    schema = Schema(
        verifier="none",
        layer_ids=(1, 2, 3, 4),
        has_last=True,
        hidden_size=settings.hidden_size,
        vocab_size=1000,
        dtype="bfloat16",
    )
    count = max(1, round(settings.megabytes * 1e6 / (length * schema.token_bytes)))
    return schema, [
        GeneratedExample(
            key=f"0/{number}",
            input_ids=torch.randint(schema.vocab_size, (length,)),
            loss_mask=torch.ones(length, dtype=torch.bool),
            num_prompt_tokens=length,
            hidden_states=torch.randn(length, 4, settings.hidden_size).bfloat16(),
        )
        for number in range(count)
    ]
