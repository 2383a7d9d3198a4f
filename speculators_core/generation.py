"""The reference decoder: draft, verify, accept, on Transformers models.

Slow beside a serving engine and easy to trust. Its counts are the yardstick for what is served:
a request's first token comes from prefill and belongs to no draft; each later verifier step is one
draft, and counts whole even where the output ends inside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from speculators_core.acceptance import accept_greedy
from speculators_core.errors import SpeculatorError
from speculators_core.proposals import GreedyTokenProposalConfig
from speculators_core.verifier import LayerTaps

DEFAULT_MAX_NEW_TOKENS = 20
"""Transformers' own, where neither a length nor a number of new tokens is given."""


class Drafter(Protocol):
    """What the loop needs of a speculator; `SpeculatorModel` says more of each."""

    config: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def verifier(self) -> PreTrainedModel: ...

    def start_drafting(self) -> Any: ...

    def propose(
        self,
        state: Any,
        next_tokens: Int[Tensor, "batch new"],
        hidden_states: Float[Tensor, "batch new aux_hidden"],
        num_tokens: int,
    ) -> Int[Tensor, "batch draft"]: ...


SUPPORTED = {
    "max_length",
    "max_new_tokens",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "return_dict_in_generate",
}
WITHOUT_EFFECT_WHEN_GREEDY = {
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "use_cache",
    "transformers_version",
    "_from_model_config",
}
NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
"""Values with which a setting does nothing."""


@dataclass(frozen=True)
class AcceptanceCounts:
    """How many tokens of each draft were kept, in order."""

    speculative_tokens: int
    accepted: list[int] = field(default_factory=list)

    @property
    def num_drafts(self) -> int:
        return len(self.accepted)

    @property
    def accepted_per_position(self) -> list[int]:
        """Drafts whose positions 1 to k were all kept, for each k."""
        positions = range(1, self.speculative_tokens + 1)
        return [sum(count >= k for count in self.accepted) for k in positions]

    @property
    def acceptance_length(self) -> float:
        """Tokens per verifier step, the bonus token included; 1 where nothing was drafted."""
        return 1.0 + sum(self.accepted) / max(1, self.num_drafts)


@dataclass
class SpeculativeOutput(ModelOutput):
    """What `generate` returns with ``return_dict_in_generate``."""

    sequences: Tensor | None = None
    acceptance: list[AcceptanceCounts] | None = None
    """One record for each row of the batch."""


@dataclass(frozen=True)
class _Limits:
    max_new_tokens: int
    stop_ids: frozenset[int]


def generate(
    speculator: Drafter,
    inputs: Int[Tensor, "batch seq"] | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: BaseStreamer | None = None,
    *,
    num_assistant_tokens: int | None = None,
    return_dict_in_generate: bool | None = None,
    input_ids: Int[Tensor, "batch seq"] | None = None,
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    **kwargs: Any,
) -> Int[Tensor, "batch total"] | SpeculativeOutput:
    """Greedy speculative decoding of one prompt; the output is the verifier's own.

    Takes the verifier's generation config and overrides as Transformers does. The number of tokens
    proposed in one step is ``num_assistant_tokens``, or else the checkpoint's.

    Raises:
        SpeculatorError: no verifier is attached in full, or it has layers without a cache to cut.
        ValueError: a prompt that is empty or too long, or an argument that is not supported.
    """
    verifier = speculator.verifier
    prompt = inputs if inputs is not None else input_ids
    config, unused = _generation_config(verifier, generation_config, kwargs)
    if unused:
        raise ValueError(f"generate does not take {', '.join(sorted(unused))}")
    if prompt is None or prompt.ndim != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0:
        found = None if prompt is None else list(prompt.shape)
        raise ValueError(f"expected input_ids of shape [1, seq] with seq >= 1, found {found}")
    if attention_mask is not None and not attention_mask.bool().all():
        raise ValueError("attention_mask masks tokens; one prompt without padding is expected")
    proposal = speculator.config.proposal
    if proposal != GreedyTokenProposalConfig(speculative_tokens=proposal.speculative_tokens):
        raise ValueError(f"only exact acceptance of greedy proposals is supported: {proposal!r}")
    num_tokens = num_assistant_tokens
    if num_tokens is None:
        num_tokens = proposal.speculative_tokens
    if num_tokens < 1:
        raise ValueError(f"num_assistant_tokens must be at least 1, found {num_tokens}")
    limits = _limits(verifier, config, prompt.shape[1])
    new_tokens, counts = decode(
        speculator, verifier, prompt.to(verifier.device), num_tokens, limits, streamer
    )
    sequences = torch.cat([prompt, prompt.new_tensor([new_tokens])], dim=1)
    if (
        return_dict_in_generate
        if return_dict_in_generate is not None
        else config.return_dict_in_generate
    ):
        return SpeculativeOutput(sequences=sequences, acceptance=[counts])
    return sequences


@torch.no_grad()
def decode(
    speculator: Drafter,
    verifier: PreTrainedModel,
    prompt: Int[Tensor, "1 seq"],
    num_tokens: int,
    limits: _Limits,
    streamer: BaseStreamer | None = None,
) -> tuple[list[int], AcceptanceCounts]:
    """New tokens of one prompt, and what was kept of each draft.

    confirmed tokens   [... x y]     the verifier has run over all but y
    propose            y -> [a b c]
    verify             [y a b c] -> the verifier's tokens [a b d e]: 2 kept, next is d
    confirmed tokens   [... x y a b d]
    """
    layer_ids = speculator.config.aux_layer_ids
    cache = DynamicCache(config=verifier.config.get_text_config())
    if not cache.is_croppable:
        raise SpeculatorError(
            f"{type(verifier).__name__} keeps a recurrent state that rejected tokens cannot be "
            "taken out of; the reference decoder needs attention layers alone."
        )
    cache.activate_past_recording()  # a window must give back what rejected tokens pushed out
    state = speculator.start_drafting()
    counts = AcceptanceCounts(num_tokens)
    longest = verifier.config.get_text_config().max_position_embeddings
    if streamer is not None:
        streamer.put(prompt.cpu())

    with LayerTaps(verifier, layer_ids) as taps:
        logits = verifier(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.crop(0)
        confirmed = prompt.shape[1]
        next_tokens = torch.cat([prompt[:, 1:], logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        new_tokens = _emit(next_tokens[0, -1:].tolist(), [], limits, streamer)
        while not _finished(new_tokens, limits):
            room = longest - confirmed - 1
            drafted = next_tokens.new_zeros((1, 0))
            if room >= num_tokens:
                hidden = taps.states(layer_ids)[:, : next_tokens.shape[1]]
                drafted = speculator.propose(
                    state,
                    next_tokens.to(speculator.device),
                    hidden.to(speculator.device, speculator.dtype),
                    num_tokens,
                ).to(prompt.device)
            verified = torch.cat([next_tokens[:, -1:], drafted], dim=1)
            logits = verifier(verified, past_key_values=cache, use_cache=True).logits
            kept = accept_greedy(drafted, logits)
            num_kept = int(kept.num_accepted)
            if drafted.shape[1]:
                counts.accepted.append(num_kept)
            cache.crop(num_kept - drafted.shape[1])
            confirmed += 1 + num_kept
            next_tokens = torch.cat([drafted[:, :num_kept], kept.next_token[:, None]], dim=1)
            new_tokens = _emit(next_tokens[0].tolist(), new_tokens, limits, streamer)
    if streamer is not None:
        streamer.end()
    return new_tokens, counts


def _emit(
    tokens: Sequence[int], new_tokens: list[int], limits: _Limits, streamer: BaseStreamer | None
) -> list[int]:
    """Appends up to the first stop token or the limit."""
    for token in tokens:
        if _finished(new_tokens, limits):
            break
        new_tokens.append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))
    return new_tokens


def _finished(new_tokens: list[int], limits: _Limits) -> bool:
    return len(new_tokens) >= limits.max_new_tokens or (
        bool(new_tokens) and new_tokens[-1] in limits.stop_ids
    )


def _generation_config(
    verifier: PreTrainedModel, given: GenerationConfig | None, overrides: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The verifier's settings under the given ones under the overrides, as in Transformers.

    Raises:
        ValueError: a setting would change the output and is not supported.
    """
    over = {k: v for k, v in given.to_dict().items() if v is not None} if given else {}
    config = GenerationConfig(**{**verifier.generation_config.to_dict(), **over})
    unused = config.update(**overrides)
    if config.do_sample:
        raise ValueError("only greedy decoding is supported: pass do_sample=False")
    neutral = GenerationConfig().to_dict()
    for name, value in config.to_dict().items():
        is_neutral = (
            value is None or value is False or value in (neutral.get(name), NEUTRAL.get(name))
        )
        if not is_neutral and name not in SUPPORTED | WITHOUT_EFFECT_WHEN_GREEDY:
            raise ValueError(f"{name}={value!r} is not supported")
    return config, unused


def _limits(verifier: PreTrainedModel, config: GenerationConfig, prompt_length: int) -> _Limits:
    longest = verifier.config.get_text_config().max_position_embeddings
    if prompt_length >= longest:
        raise ValueError(f"the prompt has {prompt_length} tokens; the verifier takes {longest}")
    if config.max_new_tokens is not None:
        max_new_tokens = config.max_new_tokens
    elif config.max_length is not None:
        if config.max_length <= prompt_length:
            raise ValueError(
                f"max_length {config.max_length} leaves the {prompt_length} tokens "
                "of the prompt no successor; raise it or pass max_new_tokens"
            )
        max_new_tokens = config.max_length - prompt_length
    else:
        max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    stop_ids = config.eos_token_id
    stop_ids = [] if stop_ids is None else [stop_ids] if isinstance(stop_ids, int) else stop_ids
    return _Limits(min(max_new_tokens, longest - prompt_length), frozenset(stop_ids))
