"""Records of data generation and their schema.

An `Example` goes into an engine, a `GeneratedExample` comes out. Stored or sent, it is a few
tensors whose first axis is tokens (`Schema.encode`), so examples are concatenated in a shard.
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
from speculators_core.verifier.sizes import required_size
from speculators_core.verifier.taps import default_aux_layer_ids

FP8_MAX = 448.0
"""The largest number of float8_e4m3fn."""
KEY_LENGTH = 512
"""Maximum number of characters of a key."""
REGENERATE = "Generate it again with `speculators generate-data`."


EXAMPLE_KEYS = (
    "key",
    "prompt",
    "output_tokens",
    "input_ids",
    "loss_mask",
    "hidden_states",
    "logits",
    "logit_ids",
)
"""Names of the parts of a generated example, which is also read as a mapping."""


@dataclass(frozen=True)
class Example:
    """Token ids to run through the verifier."""

    key: str
    """Unique in a run, and identical in every run of the same configuration."""
    input_ids: Int64[Tensor, "seq"]
    loss_mask: Bool[Tensor, "seq"]
    """Tokens that a draft learns to propose."""


@dataclass(frozen=True)
class GeneratedExample:
    """Row t holds token t and the verifier's output for it; nothing is shifted."""

    key: str
    input_ids: Int64[Tensor, "seq"]
    loss_mask: Bool[Tensor, "seq"]
    num_prompt_tokens: int
    """Tokens given to the verifier; it generated the rest."""
    hidden_states: Float[Tensor, "seq states hidden"]
    """States of the schema's layers, ascending; the last hidden state comes last."""
    logits: Float[Tensor, "seq logits"] | None = None
    """The verifier's logits: of the whole vocabulary, or of ``logit_ids``, highest first."""
    logit_ids: Int64[Tensor, "seq logits"] | None = None

    def keys(self) -> tuple[str, ...]:
        """Names of its parts, so that ``dict(example)`` has them all."""
        return EXAMPLE_KEYS

    def __getitem__(self, name: str) -> Tensor | str | None:
        """Raises KeyError for an unknown name."""
        if name not in EXAMPLE_KEYS:
            raise KeyError(f"{name}; an example has {', '.join(EXAMPLE_KEYS)}")
        return getattr(self, name)

    @property
    def prompt(self) -> Int64[Tensor, "given"]:
        """Token ids that were given."""
        return self.input_ids[: self.num_prompt_tokens]

    @property
    def output_tokens(self) -> Int64[Tensor, "written"]:
        """Token ids that the verifier wrote."""
        return self.input_ids[self.num_prompt_tokens :]

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
    """Fields, types and shapes of every example of a store or queue."""

    verifier: str
    layer_ids: tuple[int, ...]
    """Layer ids, ascending: k is the residual stream after k layers."""
    reduce: Literal["none", "mean"] = "none"
    """`mean`: the states of ``layer_ids`` except the last hidden state were averaged to one."""
    has_last: bool
    """Whether the last of ``layer_ids`` is the last hidden state."""
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
            raise ValueError(f"layer_ids {list(self.layer_ids)} must be ascending and unique")
        if self.has_last and not self.layer_ids:
            raise ValueError("has_last is true but layer_ids is empty, expected the last id")
        return self

    @classmethod
    def plan(cls, data: DataGenConfig, dtype: StoredDtype, verifier: PretrainedConfig) -> "Schema":
        """The schema that a configuration gives for this verifier.

        Raises:
            SpeculatorError: the verifier has no such layer, or fewer tokens than top-k logits.
        """
        text, states = verifier.get_text_config(), data.states
        num_layers, vocab_size, width = (
            required_size(text, key) for key in ("num_hidden_layers", "vocab_size", "hidden_size")
        )
        ids = states.layer_ids
        if ids is None:
            try:
                ids = tuple(default_aux_layer_ids(num_layers))
            except SpeculatorError as error:
                raise SpeculatorError(f"data.states.layer_ids: {error}") from error
        if list(ids) != sorted(set(ids)) or max(ids, default=0) > num_layers:
            raise SpeculatorError(
                f"data.states.layer_ids is {list(ids)}; expected unique, ascending ids in "
                f"0..{num_layers}, the layers of {data.verifier}. Correct the list, or leave it "
                "out for the default layers."
            )
        if states.last and num_layers not in ids:
            ids = (*ids, num_layers)
        if states.logits == "top-k" and states.top_k > vocab_size:
            raise SpeculatorError(
                f"data.states.top_k is {states.top_k}; expected at most {vocab_size}, the "
                f"vocabulary of {data.verifier}. Reduce it, or set data.states.logits to full."
            )
        return cls(
            verifier=data.verifier,
            layer_ids=ids,
            reduce=states.reduce,
            has_last=num_layers in ids,
            hidden_size=width,
            vocab_size=vocab_size,
            dtype=dtype,
            logits=states.logits,
            top_k=states.top_k,
        )

    @property
    def num_states(self) -> int:
        """Number of states stored per token."""
        num_aux = len(self.layer_ids) - self.has_last
        return (min(num_aux, 1) if self.reduce == "mean" else num_aux) + self.has_last

    @property
    def real_dtype(self) -> torch.dtype:
        """Data type of logits, and of states as training reads them."""
        return torch.bfloat16 if self.dtype == "float8_e4m3fn" else getattr(torch, self.dtype)

    @property
    def fields(self) -> dict[str, FieldSpec]:
        """Names, types and shapes of an example's tensors, in the order they are stored."""
        width = {"none": 0, "top-k": self.top_k, "full": self.vocab_size}[self.logits]
        states = (self.num_states, self.hidden_size)
        return _fields(self.dtype, self.real_dtype, states, width, self.logits == "top-k")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all fields."""
        return sum(
            spec.dtype.itemsize * int(torch.Size(spec.tail).numel())
            for spec in self.fields.values()
        )

    def encode(self, example: GeneratedExample) -> dict[str, Shaped[Tensor, "seq ..."]]:
        """An example's tensors as they are stored, contiguous and on the CPU."""
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
        """The example in these tensors; only float8 states are copied.

        Raises:
            SpeculatorError: they do not match the schema; ``where`` names their place.
        """
        num_tokens = self.check(tensors, where)
        if not 1 <= num_prompt_tokens <= num_tokens:
            raise SpeculatorError(
                f"{where}: num_prompt_tokens is {num_prompt_tokens}, expected 1 to {num_tokens}. "
                f"{REGENERATE}"
            )
        if not 0 < len(key) <= KEY_LENGTH:
            raise SpeculatorError(
                f"{where}: the key has {len(key)} characters, expected 1 to {KEY_LENGTH}. "
                f"{REGENERATE}"
            )
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
                f"{where}: found the tensors {', '.join(sorted(tensors)) or 'none'}; "
                f"expected {', '.join(fields)}. {REGENERATE}"
            )
        num_tokens = len(tensors["input_ids"]) if tensors["input_ids"].dim() else 0
        if num_tokens == 0:
            raise SpeculatorError(
                f"{where}: the example has no tokens, expected at least 1. {REGENERATE}"
            )
        for name, spec in fields.items():
            found, expected = tensors[name], (num_tokens, *spec.tail)
            if found.dtype != spec.dtype or tuple(found.shape) != expected:
                raise SpeculatorError(
                    f"{where}: {name} is {found.dtype} {list(found.shape)}; "
                    f"expected {spec.dtype} {list(expected)}. {REGENERATE}"
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
    """`Schema.fields`, cached because it is read for every example."""
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
    """Scaled states and their scales: each token's largest magnitude becomes float8's maximum."""
    real = states.to("cpu", torch.float32)
    largest = torch.linalg.vector_norm(real, ord=torch.inf, dim=(1, 2), keepdim=True)
    scales = (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (real / scales).to(torch.float8_e4m3fn), scales


@dataclass(frozen=True)
class Failure:
    """An example that the engine could not run; the shard's header lists it as set aside."""

    key: str
    reason: str
