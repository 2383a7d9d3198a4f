"""Data generation on Transformers."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from speculators_core.data_generation.engines.pipeline import (
    InferencePipeline,
    Steps,
    finish,
    num_tokens_of,
    seed_of,
)
from speculators_core.data_generation.examples import Example, Failure, GeneratedExample, Schema
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.verifier.head import VerifierHead
from speculators_core.verifier.proof import check_head
from speculators_core.verifier.quantization import unpack
from speculators_core.verifier.reading import load_verifier
from speculators_core.verifier.taps import LayerTaps

BATCH_SIZE = 8
"""Texts that Transformers runs at one time where none is given."""


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
        self.model: PreTrainedModel
        try:
            if isinstance(plan.data.model, PreTrainedModel):  # where the caller has put it
                self.model = unpack(plan.data.model).eval()
            else:
                names = (plan.data.verifier, dtype, plan.data.trust_remote_code)
                model = load_verifier(*names, device_map=engine.device_map)
                self.model = model if engine.device_map is not None else model.to(device)
        except (RuntimeError, AssertionError) as error:  # no such device, or no room on it
            raise SpeculatorError(
                f"engine.device {device} cannot hold the verifier: {first_line(error)}. Expected a "
                "device of this machine with enough memory; choose another one."
            ) from error
        if schema.logits != "none":
            check_head(self.model)

    @cached_property
    def head(self) -> VerifierHead:
        return VerifierHead(self.model)

    def run(self, examples: Sequence[Example]) -> list[GeneratedExample | Failure]:
        return finish(self.steps(examples))

    def steps(self, examples: Sequence[Example]) -> Steps:
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
            made = self._run(sound[first : first + size])
            done |= made
            yield num_tokens_of(made.values())
        return [done[example.key] for example in examples]

    def _run(self, batch: list[Example]) -> dict[str, GeneratedExample | Failure]:
        """Runs a batch; if it fails, runs each example separately."""
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
        written = continue_texts(
            self.model,
            [example.input_ids for example in batch],
            self.end_ids,
            engine.max_new_tokens,
            engine.temperature,
            engine.top_p,
            seed=seed_of(self.plan.run.seed, batch[0].key),
        )
        return {
            example.key: torch.cat([example.input_ids, own[:-1]])
            for example, own in zip(batch, written, strict=True)
        }

    def close(self) -> None:
        del self.model
        self.__dict__.pop("head", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def continue_texts(
    model: PreTrainedModel,
    texts: Sequence[Int64[Tensor, "_"]],
    end_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[Int64[Tensor, "_"]]:
    """What the model writes after each text, up to a token that ends it, itself included."""
    longest = max(map(len, texts))
    rows = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros_like(rows)
    for row, text in enumerate(texts):
        rows[row, longest - len(text) :] = text
        mask[row, longest - len(text) :] = 1
    settings: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        torch.manual_seed(seed)
    output = model.generate(
        input_ids=rows.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,  # whatever the verifier's generation config wants in a chat
        eos_token_id=list(end_ids) or None,
        pad_token_id=end_ids[0] if end_ids else 0,
        **settings,
    ).cpu()
    ends = torch.tensor(end_ids, dtype=torch.int64)
    return [_until_end(own[longest:], ends) for own in output]


def _until_end(written: Int64[Tensor, "seq"], ends: Int64[Tensor, "ends"]) -> Int64[Tensor, "kept"]:
    """Up to the first token that ends a text, itself included; padding follows it."""
    is_end = torch.isin(written, ends).nonzero()
    return written[: int(is_end[0, 0]) + 1] if len(is_end) else written
