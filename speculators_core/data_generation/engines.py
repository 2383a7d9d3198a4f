"""Engines: examples in, the verifier's states and logits out.

`InferencePipeline` is what every engine does, whoever runs the verifier; `TransformersPipeline`
runs it here. Engines of other packages are found in the entry-point group ``speculators.engines``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from xxhash import xxh64_intdigest

from speculators_core.data_generation.examples import Example, GeneratedExample, Schema
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.model import load_verifier
from speculators_core.registry import ENGINES
from speculators_core.verifier import (
    LayerTaps,
    VerifierHead,
    check_head,
    read_verifier_config,
    read_verifier_head,
)

BATCH_SIZE = 8
"""Texts that Transformers runs at one time where none is given."""
LOGITS_AT_ONCE = 2**25
"""Logits that exist at one time beside those that are kept."""


@dataclass(frozen=True)
class Failure:
    """An example that the engine could not run."""

    key: str
    reason: str


class InferencePipeline(ABC):
    """Runs examples through a verifier."""

    def __init__(self, plan: GenerationPlan, schema: Schema) -> None:
        self.plan = plan
        self.schema = schema

    @classmethod
    def from_config(cls, plan: GenerationPlan, schema: Schema | None = None) -> "InferencePipeline":
        """The engine that the plan names, with its verifier loaded.

        Raises:
            SpeculatorError: there is no such engine, or it cannot run this verifier.
        """
        engine: type[InferencePipeline] = ENGINES.load(plan.engine.engine)
        return engine(plan, schema or schema_of(plan))

    @abstractmethod
    def forward(self, examples: Sequence[Example]) -> list[GeneratedExample | Failure]:
        """What the verifier makes of each example, in their order.

        An example that cannot be run is a `Failure`, and the others are as if it were not there.

        Raises:
            SpeculatorError: the engine itself cannot go on.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives the engine's memory back."""

    def __enter__(self) -> Self:
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
        data = self.plan.data
        try:
            config = GenerationConfig.from_pretrained(data.verifier)
        except OSError:  # it has none
            config = GenerationConfig.from_model_config(self.verifier_config)
        found = config.eos_token_id
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    def goes_on(self, example: Example) -> bool:
        """Whether the verifier is to write behind a text; not where it has ended."""
        is_open = self.plan.data.states.tokens == "all"
        return is_open and int(example.input_ids[-1]) not in self.end_ids

    @cached_property
    def head(self) -> VerifierHead:
        """Final norm and head; an engine that has them in memory gives its own."""
        return read_verifier_head(
            self.plan.data.verifier, trust_remote_code=self.plan.data.trust_remote_code
        )

    def fault(self, example: Example) -> str | None:
        """Why an example cannot be run by any engine."""
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
        """What is kept of an example whose tokens, with those written, are ``token_ids``."""
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
        """A few tokens at a time: a text's logits over the whole vocabulary can be gigabytes."""
        pieces = []
        with torch.no_grad():
            for rows in last.split(max(1, LOGITS_AT_ONCE // self.schema.vocab_size)):
                logits = self.head(rows)
                top = None if self.schema.logits == "full" else logits.topk(self.schema.top_k)
                pieces.append((logits, None) if top is None else (top.values, top.indices))
        ids = [piece[1] for piece in pieces if piece[1] is not None]
        return torch.cat([piece[0] for piece in pieces]), torch.cat(ids) if ids else None


def schema_of(plan: GenerationPlan) -> Schema:
    """What the plan keeps of its verifier, of which the config alone is read.

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
            f"{what} come to {plan.engine.max_length + written} tokens; {plan.data.verifier} has "
            f"{longest} positions."
        )
    return schema


class TransformersPipeline(InferencePipeline):
    """The verifier on Transformers, a few texts of like lengths beside one another.

    Texts are padded on the right, where causal layers never look, so no mask is needed and no value
    depends on the padding.
    """

    def __init__(self, plan: GenerationPlan, schema: Schema) -> None:
        super().__init__(plan, schema)
        engine = plan.engine
        dtype = None if engine.dtype == "auto" else getattr(torch, engine.dtype)
        device = engine.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = load_verifier(plan.data.verifier, dtype, plan.data.trust_remote_code)
            self.model: PreTrainedModel = model.to(device)
        except (RuntimeError, AssertionError) as error:  # no such device, or no room on it
            raise SpeculatorError(f"engine.device {device}: {first_line(error)}") from error
        if schema.logits != "none":
            check_head(self.model)

    @cached_property
    def head(self) -> VerifierHead:
        return VerifierHead(self.model)

    def forward(self, examples: Sequence[Example]) -> list[GeneratedExample | Failure]:
        done: dict[str, GeneratedExample | Failure] = {}
        sound = []
        for example in examples:
            fault = self.fault(example)
            if fault is None:
                sound.append(example)
            else:
                done[example.key] = Failure(example.key, fault)
        sound.sort(key=lambda example: (-len(example.input_ids), example.key))
        size = self.plan.engine.batch_size or BATCH_SIZE
        for first in range(0, len(sound), size):
            done |= self._run(sound[first : first + size])
        return [done[example.key] for example in examples]

    def _run(self, batch: list[Example]) -> dict[str, GeneratedExample | Failure]:
        """A batch, or where it fails each of its examples alone."""
        try:
            with torch.no_grad():
                return {formed.key: formed for formed in self._run_together(batch)}
        except Exception as error:  # of the model's own code, memory too
            if len(batch) == 1:
                return {batch[0].key: Failure(batch[0].key, first_line(error))}
        return {key: formed for example in batch for key, formed in self._run([example]).items()}

    def _run_together(self, batch: list[Example]) -> list[GeneratedExample | Failure]:
        texts = {example.key: example.input_ids for example in batch}
        texts |= self._continued([example for example in batch if self.goes_on(example)])
        rows = torch.nn.utils.rnn.pad_sequence(list(texts.values()), batch_first=True)
        rows = rows.to(self.model.device)
        ids = self.captured_ids
        with LayerTaps(self.model, ids) as taps:
            self.model.get_decoder()(input_ids=rows, use_cache=False)
            states = taps.states(ids).unflatten(
                -1, (len(ids), -1)
            )  # [batch, seq, captured, hidden]
        return [
            self.form(example, text, own[: len(text)])
            for example, text, own in zip(batch, texts.values(), states, strict=True)
        ]

    def _continued(self, batch: list[Example]) -> dict[str, Int64[Tensor, "seq"]]:
        """Each text, by its key, with what the verifier writes, but its last token.

        That one was never read by the verifier, and engines that do not read it again have no
        state for it.
        """
        if not batch:
            return {}
        engine = self.plan.engine
        longest = max(len(example.input_ids) for example in batch)
        rows = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(rows)
        for row, example in enumerate(batch):
            rows[row, longest - len(example.input_ids) :] = example.input_ids
            mask[row, longest - len(example.input_ids) :] = 1
        settings: dict[str, Any] = {"do_sample": engine.temperature > 0}
        if engine.temperature > 0:
            settings |= {"temperature": engine.temperature, "top_p": engine.top_p, "top_k": 0}
            torch.manual_seed(seed_of(self.plan.run.seed, batch[0].key))
        output = self.model.generate(
            input_ids=rows.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=engine.max_new_tokens,
            repetition_penalty=1.0,  # whatever the verifier's generation config wants in a chat
            **settings,
        ).cpu()
        ends = torch.tensor(self.end_ids, dtype=torch.int64)
        return {
            example.key: torch.cat([example.input_ids, _until_end(own[longest:], ends)[:-1]])
            for example, own in zip(batch, output, strict=True)
        }

    def close(self) -> None:
        del self.model
        self.__dict__.pop("head", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _until_end(written: Int64[Tensor, "seq"], ends: Int64[Tensor, "ends"]) -> Int64[Tensor, "kept"]:
    """Up to the first token that ends a text, itself included; padding follows it."""
    is_end = torch.isin(written, ends).nonzero()
    return written[: int(is_end[0, 0]) + 1] if len(is_end) else written


def seed_of(seed: int, key: str) -> int:
    """The same for the same batch, whichever worker runs it."""
    return xxh64_intdigest(key.encode(), seed=seed) >> 1
