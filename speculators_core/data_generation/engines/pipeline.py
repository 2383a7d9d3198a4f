"""Engines: examples in, the verifier's states and logits out.

`InferencePipeline` is the base class of all engines; `TransformersPipeline` runs the verifier in
this process. Other packages register engines in the entry-point group ``speculators.engines``.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import GenerationConfig
from xxhash import xxh64_intdigest

from speculators_core.data_generation.documented import InputItem, ItemReader, as_plan
from speculators_core.data_generation.examples import Example, Failure, GeneratedExample, Schema
from speculators_core.data_generation.settings import DataGenConfig, GenerationPlan
from speculators_core.errors import SpeculatorError
from speculators_core.registry import ENGINES
from speculators_core.verifier.head import VerifierHead
from speculators_core.verifier.reading import (
    read_generation_config,
    read_verifier_config,
    read_verifier_head,
)

Steps = Generator[int, None, list[GeneratedExample | Failure]]
"""Numbers of tokens, each since the one before; the outcomes are returned at the end."""


class InferencePipeline(ABC):
    """Runs examples through a verifier."""

    def __init__(self, plan: GenerationPlan, schema: Schema) -> None:
        self.plan = plan
        self.schema = schema

    @classmethod
    def from_config(
        cls,
        plan: GenerationPlan | DataGenConfig,
        schema: Schema | None = None,
        **engine_kwargs: object,
    ) -> "InferencePipeline":
        """The engine that the plan names, with its verifier loaded.

        ``engine_kwargs``: options of `EngineConfig`, beside a `DataGenConfig` alone.

        Raises:
            SpeculatorError: there is no such engine, or it cannot run this verifier.
        """
        plan = as_plan(plan, engine_kwargs, is_stored=False)
        engine: type[InferencePipeline] = ENGINES.load(plan.engine.name)
        return engine(plan, schema or schema_of(plan))

    @abstractmethod
    def run(self, examples: Sequence[Example]) -> list[GeneratedExample | Failure]:
        """The verifier's output for each example, in order.

        An example that cannot be run becomes a `Failure` and does not affect the others.

        Raises:
            SpeculatorError: the engine itself cannot continue.
        """

    def steps(self, examples: Sequence[Example]) -> Steps:
        """`run` in steps, so that a run can show its tokens as they come.

        An engine that overrides it yields the tokens that it has read and written since the last
        time.
        """
        yield from ()
        return self.run(examples)

    def forward(self, batch: Sequence[InputItem]) -> list[GeneratedExample]:
        """What the verifier makes of texts, conversations, or rows of a data set, one for each.

        Of a conversation that a chat template leads to several examples, the first.

        Raises:
            SpeculatorError: an item cannot be used, or the engine failed on it.
        """
        outcomes = self.run(self._reader.read(batch))
        for one in outcomes:
            if isinstance(one, Failure):
                raise SpeculatorError(f"item {one.key}: {one.reason}. Remove or shorten it.")
        return [one for one in outcomes if isinstance(one, GeneratedExample)]

    @cached_property
    def _reader(self) -> ItemReader:
        return ItemReader(self.plan.data, self.plan.engine.max_length)

    @abstractmethod
    def close(self) -> None:
        """Releases the engine's memory."""

    def __enter__(self) -> "InferencePipeline":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- for engines ----

    @property
    def captured_ids(self) -> tuple[int, ...]:
        """Layers whose states an engine hands to `form`, ascending; logits need the last."""
        ids = self.schema.layer_ids
        needs_last = self.schema.logits != "none" and not self.schema.has_last
        return (*ids, self.num_layers) if needs_last else ids

    @cached_property
    def num_layers(self) -> int:
        return self.verifier_config.get_text_config().num_hidden_layers

    @cached_property
    def verifier_config(self) -> Any:
        data = self.plan.data
        return read_verifier_config(data.verifier, data.trust_remote_code)

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens that end a text."""
        config = read_generation_config(self.plan.data.verifier)
        if config is None:
            config = GenerationConfig.from_model_config(self.verifier_config)
        found = config.eos_token_id
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    def goes_on(self, example: Example) -> bool:
        """Whether the verifier continues this text: it is asked to, and the text has no end."""
        is_open = self.plan.data.states.tokens == "all"
        return is_open and int(example.input_ids[-1]) not in self.end_ids

    @cached_property
    def head(self) -> VerifierHead:
        """Final norm and head; an engine that has them in memory overrides this."""
        return read_verifier_head(
            self.plan.data.verifier, trust_remote_code=self.plan.data.trust_remote_code
        )

    def fault(self, example: Example) -> str | None:
        """Why no engine can run this example; None where one can."""
        outside = (example.input_ids < 0) | (example.input_ids >= self.schema.vocab_size)
        if outside.any():
            return (
                f"token id {int(example.input_ids[outside][0])} is not in the vocabulary of "
                f"{self.schema.vocab_size}"
            )
        room = self.plan.engine.max_length
        if not 1 <= len(example.input_ids) <= room:
            return f"{len(example.input_ids)} tokens, expected 1 to {room} (engine.max_length)"
        return None

    def form(
        self,
        example: Example,
        token_ids: Int64[Tensor, "seq"],
        states: Float[Tensor, "seq captured hidden"],
    ) -> GeneratedExample | Failure:
        """The record of an example; ``token_ids`` are its tokens and those that were generated."""
        schema, num_given = self.schema, len(example.input_ids)
        if not torch.equal(token_ids[:num_given], example.input_ids):
            return Failure(example.key, "the engine read other tokens than it was given")
        logits, logit_ids = (None, None) if schema.logits == "none" else self._logits(states[:, -1])
        kept = self._reduced(states[:, : len(schema.layer_ids)]).to(schema.real_dtype)
        logits = None if logits is None else logits.to(schema.real_dtype)
        for what, tensor in (("states", kept), ("logits", logits)):
            if tensor is not None and not tensor.isfinite().all():
                dtype = str(schema.real_dtype).removeprefix("torch.")
                return Failure(example.key, f"the verifier's {what} are not finite in {dtype}")
        written = torch.ones(len(token_ids) - num_given, dtype=torch.bool)
        return GeneratedExample(
            key=example.key,
            input_ids=token_ids,
            loss_mask=torch.cat([example.loss_mask, written]),
            num_prompt_tokens=num_given,
            hidden_states=kept.to("cpu"),
            logits=None if logits is None else logits.to("cpu"),
            logit_ids=None if logit_ids is None else logit_ids.to("cpu"),
        )

    def _reduced(
        self, states: Float[Tensor, "seq layers hidden"]
    ) -> Float[Tensor, "seq states hidden"]:
        num_aux = len(self.schema.layer_ids) - self.schema.has_last
        if self.schema.reduce == "none" or num_aux < 2:
            return states
        mean = states[:, :num_aux].float().mean(1, keepdim=True).to(states.dtype)
        return torch.cat([mean, states[:, num_aux:]], dim=1)

    def _logits(
        self, last: Float[Tensor, "seq hidden"]
    ) -> tuple[Float[Tensor, "seq logits"], Int64[Tensor, "seq logits"] | None]:
        pieces = []
        with torch.no_grad():
            for logits in self.head.chunks(last):
                top = None if self.schema.logits == "full" else logits.topk(self.schema.top_k)
                pieces.append((logits, None) if top is None else (top.values, top.indices))
        ids = [piece[1] for piece in pieces if piece[1] is not None]
        return torch.cat([piece[0] for piece in pieces]), torch.cat(ids) if ids else None


def schema_of(plan: GenerationPlan) -> Schema:
    """The schema of a plan's examples; only the verifier's config is read.

    Raises:
        SpeculatorError: there is no such verifier, or the plan does not fit it.
    """
    config = read_verifier_config(plan.data.verifier, plan.data.trust_remote_code)
    schema = Schema.plan(plan.data, plan.sync.dtype, config)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    written = plan.engine.max_new_tokens if plan.data.states.tokens == "all" else 0
    if longest is not None and plan.engine.max_length + written > longest:
        what = "engine.max_length and engine.max_new_tokens" if written else "engine.max_length"
        raise SpeculatorError(
            f"{what} add up to {plan.engine.max_length + written} tokens; expected at most "
            f"{longest}, the positions of {plan.data.verifier}. Reduce {what}."
        )
    return schema


def finish(steps: Steps) -> list[GeneratedExample | Failure]:
    """The outcomes at the end of the steps."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def num_tokens_of(outcomes: Iterable[GeneratedExample | Failure]) -> int:
    """Tokens of the examples, without those that failed."""
    return sum(len(one.input_ids) for one in outcomes if isinstance(one, GeneratedExample))


def seed_of(seed: int, key: str) -> int:
    """A seed that depends only on the run's seed and the key, not on the worker."""
    return xxh64_intdigest(key.encode(), seed=seed) >> 1
