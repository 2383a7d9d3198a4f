"""The records of data generation, and the schema that every border holds them against.

An `Example` goes into an engine, a `GeneratedExample` comes out. Stored or sent it is a few tensors
with the tokens as first axis (`Schema.encode`), so that examples of a shard lie end to end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PretrainedConfig

from speculators_core.data_generation.settings import DataGenConfig, StoredDtype
from speculators_core.errors import SpeculatorError
from speculators_core.settings import Settings
from speculators_core.verifier.taps import default_aux_layer_ids

FP8_MAX = 448.0
"""The largest number of float8_e4m3fn."""
KEY_LENGTH = 512
"""Characters of a key, at most."""


@dataclass(frozen=True)
class Example:
    """Token ids to run through the verifier."""

    key: str
    """Unique in a run, and the same in each run of the same configuration."""
    input_ids: Int64[Tensor, "seq"]
    loss_mask: Bool[Tensor, "seq"]
    """Tokens that a draft learns to propose."""


@dataclass(frozen=True)
class GeneratedExample:
    """Row t is token t, and what the verifier made of it; nothing is shifted."""

    key: str
    input_ids: Int64[Tensor, "seq"]
    loss_mask: Bool[Tensor, "seq"]
    num_prompt_tokens: int
    """Tokens that were given; the verifier wrote the others."""
    hidden_states: Float[Tensor, "seq states hidden"]
    """Of the schema's layers, ascending; the last state, before the final norm, is the last."""
    logits: Float[Tensor, "seq logits"] | None = None
    """The verifier's, of all tokens or of ``logit_ids``, highest first."""
    logit_ids: Int64[Tensor, "seq logits"] | None = None

    @property
    def size_bytes(self) -> int:
        logits = 0 if self.logits is None else self.logits.nbytes
        return self.input_ids.nbytes + self.hidden_states.nbytes + logits


@dataclass(frozen=True)
class FieldSpec:
    """A stored tensor of one example: [seq, *tail]."""

    dtype: torch.dtype
    tail: tuple[int, ...] = ()


class Schema(Settings):
    """What each example of a store or a queue holds."""

    verifier: str
    layer_ids: tuple[int, ...]
    """Ascending: k is the residual stream after k layers."""
    reduce: Literal["none", "mean"] = "none"
    """`mean`: the states of ``layer_ids``, but the last, were averaged to one."""
    has_last: bool
    """Whether the last of ``layer_ids`` is the state after all layers."""
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    dtype: StoredDtype
    logits: Literal["none", "top-k", "full"] = "none"
    top_k: int = 64

    @model_validator(mode="after")
    def _holds_together(self) -> "Schema":
        if (
            list(self.layer_ids) != sorted(set(self.layer_ids))
            or min(self.layer_ids, default=0) < 0
        ):
            raise ValueError(f"layer_ids {list(self.layer_ids)} must be ascending without doubles")
        if self.has_last and not self.layer_ids:
            raise ValueError("has_last without layer_ids")
        return self

    @classmethod
    def plan(cls, data: DataGenConfig, dtype: StoredDtype, verifier: PretrainedConfig) -> "Schema":
        """The schema of what a configuration keeps of this verifier.

        Raises:
            SpeculatorError: a layer is not one of the verifier's, or there are more top-k logits
                than tokens.
        """
        text, states = verifier.get_text_config(), data.states
        num_layers = text.num_hidden_layers
        ids = states.layer_ids
        if ids is None:
            try:
                ids = tuple(default_aux_layer_ids(num_layers))
            except SpeculatorError as error:
                raise SpeculatorError(f"data.states.layer_ids: {error}") from error
        if list(ids) != sorted(set(ids)) or max(ids, default=0) > num_layers:
            raise SpeculatorError(
                f"data.states.layer_ids {list(ids)}: expected ascending ids of 0..{num_layers}, "
                f"the layers of {data.verifier}."
            )
        if states.last and num_layers not in ids:
            ids = (*ids, num_layers)
        if states.logits == "top-k" and states.top_k > text.vocab_size:
            raise SpeculatorError(
                f"data.states.top_k {states.top_k}: {data.verifier} has {text.vocab_size} tokens."
            )
        return cls(
            verifier=data.verifier,
            layer_ids=ids,
            reduce=states.reduce,
            has_last=num_layers in ids,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            dtype=dtype,
            logits=states.logits,
            top_k=states.top_k,
        )

    @property
    def num_states(self) -> int:
        """States of a token."""
        num_aux = len(self.layer_ids) - self.has_last
        return (min(num_aux, 1) if self.reduce == "mean" else num_aux) + self.has_last

    @property
    def real_dtype(self) -> torch.dtype:
        """Of states as training reads them, and of logits."""
        return torch.bfloat16 if self.dtype == "float8_e4m3fn" else getattr(torch, self.dtype)

    @property
    def fields(self) -> dict[str, FieldSpec]:
        """Names, types and shapes of an example's tensors, in the order in which they are kept."""
        width = {"none": 0, "top-k": self.top_k, "full": self.vocab_size}[self.logits]
        states = (self.num_states, self.hidden_size)
        return _fields(self.dtype, self.real_dtype, states, width, self.logits == "top-k")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, in all fields."""
        return sum(
            spec.dtype.itemsize * int(torch.Size(spec.tail).numel())
            for spec in self.fields.values()
        )

    def encode(self, example: GeneratedExample) -> dict[str, Shaped[Tensor, "seq ..."]]:
        """An example's tensors as they are kept, contiguous and on the CPU."""
        encoded: dict[str, Tensor | None] = {
            "input_ids": example.input_ids,
            "loss_mask": example.loss_mask,
            "hidden_states": example.hidden_states,
            "logits": example.logits,
            "logit_ids": example.logit_ids,
        }
        if self.dtype == "float8_e4m3fn":
            encoded["hidden_states"], encoded["hidden_states_scales"] = _to_fp8(
                example.hidden_states
            )
        tensors = {}
        for name, spec in self.fields.items():
            tensor = encoded[name]
            assert tensor is not None, name
            tensors[name] = tensor.to("cpu", spec.dtype).contiguous()
        self.check(tensors, example.key)
        return tensors

    def decode(
        self, key: str, num_prompt_tokens: int, tensors: Mapping[str, Tensor], where: str
    ) -> GeneratedExample:
        """The example in these tensors, without a copy but for float8.

        Raises:
            SpeculatorError: they are not what the schema says; ``where`` names the place.
        """
        num_tokens = self.check(tensors, where)
        if not 1 <= num_prompt_tokens <= num_tokens:
            raise SpeculatorError(f"{where}: {num_prompt_tokens} prompt tokens of {num_tokens}.")
        if not 0 < len(key) <= KEY_LENGTH:
            raise SpeculatorError(f"{where}: a key of {len(key)} characters.")
        states = tensors["hidden_states"]
        if self.dtype == "float8_e4m3fn":
            scaled = states.to(torch.float32) * tensors["hidden_states_scales"]
            states = scaled.to(self.real_dtype)
        ids = tensors.get("logit_ids")
        return GeneratedExample(
            key=key,
            input_ids=tensors["input_ids"],
            loss_mask=tensors["loss_mask"],
            num_prompt_tokens=num_prompt_tokens,
            hidden_states=states,
            logits=tensors.get("logits"),
            logit_ids=None if ids is None else ids.to(torch.int64),
        )

    def check(self, tensors: Mapping[str, Tensor], where: str) -> int:
        """The number of tokens.

        Raises:
            SpeculatorError: a tensor is missing, unknown, or of another type or shape.
        """
        fields = self.fields
        if tensors.keys() != fields.keys():
            raise SpeculatorError(
                f"{where}: holds {', '.join(sorted(tensors)) or 'nothing'}; "
                f"expected {', '.join(fields)}."
            )
        num_tokens = len(tensors["input_ids"]) if tensors["input_ids"].dim() else 0
        if num_tokens == 0:
            raise SpeculatorError(f"{where}: an example of no tokens.")
        for name, spec in fields.items():
            found, expected = tensors[name], (num_tokens, *spec.tail)
            if found.dtype != spec.dtype or tuple(found.shape) != expected:
                raise SpeculatorError(
                    f"{where}: {name} is {found.dtype} {list(found.shape)}; "
                    f"expected {spec.dtype} {list(expected)}."
                )
        return num_tokens


@cache
def _fields(
    stored: StoredDtype,
    real_dtype: torch.dtype,
    states: tuple[int, int],
    num_logits: int,
    has_ids: bool,
) -> dict[str, FieldSpec]:
    """Asked for with each example that is read."""
    found = {
        "input_ids": FieldSpec(torch.int64),
        "loss_mask": FieldSpec(torch.bool),
        "hidden_states": FieldSpec(getattr(torch, stored), states),
    }
    if stored == "float8_e4m3fn":
        found["hidden_states_scales"] = FieldSpec(torch.float32, (1, 1))
    if num_logits:
        found["logits"] = FieldSpec(real_dtype, (num_logits,))
    if has_ids:
        found["logit_ids"] = FieldSpec(torch.int32, (num_logits,))
    return found


def _to_fp8(
    states: Float[Tensor, "seq states hidden"],
) -> tuple[Shaped[Tensor, "seq states hidden"], Float[Tensor, "seq 1 1"]]:
    """States over their scales: a token's largest number is the largest that float8 has."""
    real = states.to("cpu", torch.float32)
    largest = torch.linalg.vector_norm(real, ord=torch.inf, dim=(1, 2), keepdim=True)
    scales = (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (real / scales).to(torch.float8_e4m3fn), scales


@dataclass(frozen=True)
class Failure:
    """An example that the engine could not run; a shard's header lists it, a run sets it aside."""

    key: str
    reason: str
