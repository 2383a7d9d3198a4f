"""The reference decoder: draft, verify, accept, on Transformers models.

Slower than a serving engine and easier to trust. A served draft is compared with its counts:
a request's first token comes from prefill and belongs to no draft; each later verifier step is one
draft, and counts whole even where the output ends inside it.

Transformers' `generate` reads the settings, builds the logits processors and stopping criteria,
pads and expands the prompts, and then calls the loop of this module.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from speculators_core.batch import PADDING
from speculators_core.decoding.acceptance import Acceptance, AcceptanceCounts
from speculators_core.decoding.drafter import Confirmed, Drafter, DraftState, Proposal
from speculators_core.decoding.row_cache import RowCache
from speculators_core.decoding.rules import STATELESS_PROCESSORS, Rules
from speculators_core.decoding.sequences import Sequence, Sequences, by_place
from speculators_core.format.proposals import TokenProposalConfig
from speculators_core.verifier.taps import LayerTaps

ARGUMENTS = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "tokenizer",
}
"""Arguments passed to Transformers, beside the options of a `GenerationConfig`."""
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NEUTRAL_VALUES = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "output_attentions": False,
    "output_hidden_states": False,
    "cache_implementation": "dynamic",
    "token_healing": False,
}
"""Options that the loop ignores, with the value beside None at which they have no effect."""


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """The result of `generate` with ``return_dict_in_generate``.

    ``scores`` and ``logits`` of a row are zero after its end token.
    """

    scores: tuple[Float[Tensor, "sequences vocab"], ...] | None = None
    logits: tuple[Float[Tensor, "sequences vocab"], ...] | None = None
    acceptance: list[AcceptanceCounts] | None = None
    """One record for each row of the batch."""
    lossy_options: dict[str, int | float] | None = None
    """Options that let the output differ from the verifier's; None where it does not."""


def generate(
    drafter: Drafter,
    verifier: PreTrainedModel,
    proposal: TokenProposalConfig,
    inputs: Int[Tensor, "batch seq"] | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    num_assistant_tokens: int | None = None,
    generator: torch.Generator | None = None,
    streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> Int[Tensor, "sequences total"] | SpeculativeOutput:
    """Speculative decoding; every other argument as for the verifier's ``generate``.

    With ``num_return_sequences`` there are as many sequences of each prompt, one after another.

    Greedy output equals the verifier's, sampled output has its distribution. A batch may hold
    prompts of unequal length, padded on the left. ``num_assistant_tokens``, here or in the config,
    replaces the proposal's ``speculative_tokens``; ``generator`` makes a sampled run repeatable.

    Rows of a batch advance at different paces, so logits processors and stopping criteria are
    called for one row at a time, processors also after drafted tokens that are then rejected: they
    must depend on nothing but that row's text. No cache is returned.

    Raises:
        SpeculatorError: the verifier has layers without a cache that tokens can be taken out of.
        ValueError: beams, encoder or image inputs, or another argument that is not supported.
    """
    if verifier.config.is_encoder_decoder:
        raise ValueError(f"{type(verifier).__name__} has an encoder; expected a decoder-only model")
    _check_arguments(kwargs)
    stated = (num_assistant_tokens, getattr(generation_config, "num_assistant_tokens", None))
    num_tokens = next((n for n in stated if n is not None), proposal.speculative_tokens)
    if num_tokens < 1:
        raise ValueError(f"num_assistant_tokens must be at least 1, found {num_tokens}")

    def loop(
        model: PreTrainedModel,
        input_ids: Int[Tensor, "batch seq"],
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        # The mask is among these: Transformers would not prepare one that has a name here.
        **model_inputs: Any,
    ) -> Int[Tensor, "sequences total"] | SpeculativeOutput:
        _check_options(vars(generation_config))
        rules = Rules(
            logits_processor,
            stopping_criteria,
            generation_config,
            proposal,
            num_tokens,
            generator,
            streamer,
        )
        return _output(
            decode(drafter, model, input_ids, model_inputs.get("attention_mask"), rules), rules
        )

    kwargs = _with_stop_strings(verifier, generation_config, kwargs)
    return verifier.generate(
        inputs, generation_config, streamer=streamer, custom_generate=loop, **kwargs
    )


@contextmanager
def neutral_generation(verifier: PreTrainedModel) -> Iterator[None]:
    """Sets aside what a verifier's generation config asks for, but for its special tokens.

    Transformers takes from it whatever a call does not state: penalties, sampling, beams. A
    measurement is of the verifier alone, so it decodes inside.
    """
    stated = verifier.generation_config
    verifier.generation_config = GenerationConfig(
        **{name: getattr(stated, name, None) for name in SPECIAL_TOKENS}
    )
    try:
        yield
    finally:
        verifier.generation_config = stated


def _with_stop_strings(
    verifier: PreTrainedModel, config: GenerationConfig | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments with a criterion for stop strings, where there are any.

    Transformers (5.19) drops the tokenizer for it on the way to a custom loop.
    """
    arguments = dict(arguments)
    tokenizer = arguments.pop("tokenizer", None)
    stated = (arguments.get("stop_strings"), getattr(config, "stop_strings", None))
    strings = next((s for s in stated if s is not None), verifier.generation_config.stop_strings)
    if tokenizer is not None and strings is not None:
        criteria = arguments.get("stopping_criteria") or []
        arguments["stopping_criteria"] = [*criteria, StopStringCriteria(tokenizer, strings)]
        arguments["stop_strings"] = None
    return arguments


def _check_arguments(arguments: Mapping[str, object]) -> None:
    """Raises ValueError where an argument is unknown, or would not have its effect."""
    options = vars(GenerationConfig())
    for name, value in arguments.items():
        if value is not None and name not in ARGUMENTS and name not in options:
            raise ValueError(
                f"{name} is not supported: the reference decoder takes input_ids, attention_mask "
                "and the options of a GenerationConfig"
            )
        if name.endswith("token_type_ids") and isinstance(value, Tensor) and value.any():
            raise ValueError(f"{name} marks more than text; expected zeros")
    _check_options(arguments)


def _check_options(options: Mapping[str, object]) -> None:
    for name, neutral in NEUTRAL_VALUES.items():
        if options.get(name) not in (None, neutral):
            raise ValueError(f"{name}={options[name]!r} is not supported by the reference decoder")


@torch.no_grad()
def decode(
    drafter: Drafter,
    verifier: PreTrainedModel,
    prompts: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"] | None,
    rules: Rules,
) -> Sequences:
    """The finished sequences of a batch, with the accepted counts of each draft.

    confirmed tokens   [... x y]     the verifier has run over all but y
    propose            y -> [a b c]
    verify             [y a b c] -> the verifier's tokens [a b d e]: 2 kept, next is d
    confirmed tokens   [... x y a b d]

    Rows of a batch keep different numbers of tokens; a finished row leaves the batch. Nothing is
    drafted while a row is at the last position that the verifier was made for.
    """
    is_token = torch.ones_like(prompts, dtype=torch.bool)
    if attention_mask is not None:
        is_token = attention_mask.bool()
    if not is_token[:, -1].all():
        raise ValueError(
            "attention_mask ends in padding: pad prompts on the left, or pass the mask where a "
            "prompt itself ends in the pad token"
        )
    longest = getattr(verifier.config.get_text_config(), "max_position_embeddings", None)
    sequences, alive = Sequences(prompts, rules), list(range(len(prompts)))
    cache, state = RowCache(verifier), drafter.start_drafting()
    with LayerTaps(verifier, drafter.aux_layer_ids) as taps:
        logits = cache.run(prompts, is_token, logits_to_keep=1)
        kept = _settle(sequences.rows, Proposal(prompts[:, :0]), logits, rules)
        confirmed = Confirmed(
            torch.cat([prompts, kept.next_token[:, None]], dim=1),
            (is_token.long().cumsum(1) - 1).masked_fill(~is_token, PADDING),
            taps.states(taps.layer_ids),
        )
        while rows := sequences.unwritten():
            sequences.stream()
            if len(rows) < len(alive):
                index = torch.tensor(_places(rows, alive), device=prompts.device)
                cache.select_rows(index)
                state.select_rows(index.to(drafter.device))
                confirmed, alive = _select(confirmed, index), rows
            bonus = confirmed.token_ids[:, -1:]
            position = confirmed.positions[:, -1:] + 1  # of the bonus token
            can_draft = longest is None or int(position.max()) + rules.num_tokens < longest
            proposal = Proposal(bonus[:, :0])
            if can_draft:
                proposal = _propose(drafter, state, confirmed, rules)
            tokens = torch.cat([bonus, proposal.token_ids], dim=1)
            logits = cache.run(tokens)
            kept = _settle([sequences.rows[row] for row in alive], proposal, logits, rules)
            cache.forget(proposal.token_ids.shape[1] - kept.num_accepted)
            news = _confirm(tokens, position, kept, taps.states(taps.layer_ids))
            confirmed = news if can_draft else _join(confirmed, news)
    sequences.stream()
    if rules.streamer is not None:
        rules.streamer.end()
    return sequences


def _places(rows: list[int], among: list[int]) -> list[int]:
    place = {row: index for index, row in enumerate(among)}
    return [place[row] for row in rows]


def _propose(drafter: Drafter, state: DraftState, confirmed: Confirmed, rules: Rules) -> Proposal:
    """The drafter's proposal, moved from the drafter's device to the verifier's."""
    known = Confirmed(
        confirmed.token_ids.to(drafter.device),
        confirmed.positions.to(drafter.device),
        confirmed.hidden_states.to(drafter.device, drafter.dtype),
    )
    proposal = drafter.propose(state, known, rules.num_tokens, rules.choose)
    device = confirmed.token_ids.device
    return Proposal(
        proposal.token_ids.to(device),
        None if proposal.probs is None else proposal.probs.to(device),
        proposal.num_proposed,
    )


def _settle(
    sequences: list[Sequence],
    proposal: Proposal,
    logits: Float[Tensor, "batch places vocab"],
    rules: Rules,
) -> Acceptance:
    """Verifies a proposal, and appends the accepted tokens and the verifier's next one."""
    drafted = proposal.token_ids
    processors = rules.logits_processor
    if {type(processor) for processor in processors} <= STATELESS_PROCESSORS:
        flat = logits.flatten(0, 1).float() if processors else logits
        for processor in processors:
            flat = processor(drafted, flat)
        scores = flat.view(logits.shape)
    else:
        rows = zip(sequences, drafted, logits.float(), strict=True)
        scores = torch.stack(
            [sequence.process(row, row_logits) for sequence, row, row_logits in rows]
        )
    kept = rules.accept(proposal, scores)
    proposed = [drafted.shape[1]] * len(sequences)
    if proposal.num_proposed is not None:
        proposed = proposal.num_proposed.tolist()
    num_accepted = kept.num_accepted.tolist()
    for row, (sequence, count) in enumerate(zip(sequences, num_accepted, strict=True)):
        if proposed[row] and sequence.end is None:
            sequence.counts.accepted.append(min(count, proposed[row]))
        new = torch.cat([drafted[row, :count], kept.next_token[row : row + 1]])
        sequence.append(new, scores[row], logits[row])
    return kept


def _confirm(
    tokens: Int[Tensor, "batch places"],
    bonus_position: Int[Tensor, "batch 1"],
    kept: Acceptance,
    states: Float[Tensor, "batch places aux_hidden"],
) -> Confirmed:
    """The tokens that a verifier step confirmed, aligned to the right."""
    longest = int(kept.num_accepted.max()) + 1
    place = torch.arange(longest, device=tokens.device)
    place = place - (longest - 1 - kept.num_accepted[:, None])  # [batch, longest]
    index = place.clamp_min(0)
    return Confirmed(
        torch.cat([tokens.gather(1, index), kept.next_token[:, None]], dim=1),
        (bonus_position + place).masked_fill(place < 0, PADDING),
        states.take_along_dim(index[..., None], 1),
    )


def _join(first: Confirmed, then: Confirmed) -> Confirmed:
    """Both as one: the second begins with the bonus token of the first."""
    return Confirmed(
        torch.cat([first.token_ids[:, :-1], then.token_ids], dim=1),
        torch.cat([first.positions, then.positions], dim=1),
        torch.cat([first.hidden_states, then.hidden_states], dim=1),
    )


def _select(confirmed: Confirmed, rows: Int[Tensor, "rows"]) -> Confirmed:
    return Confirmed(
        confirmed.token_ids[rows], confirmed.positions[rows], confirmed.hidden_states[rows]
    )


def _output(
    sequences: Sequences, rules: Rules
) -> Int[Tensor, "sequences total"] | SpeculativeOutput:
    length, rows = sequences.length, sequences.rows
    assert length is not None
    padded = sequences.padded(length)
    if not rules.config.return_dict_in_generate:
        return padded
    num_new = length - rows[0].prompt_length
    scores = by_place([row.scores for row in rows], num_new) if rules.keeps_scores else None
    logits = by_place([row.logits for row in rows], num_new) if rules.keeps_logits else None
    return SpeculativeOutput(
        sequences=padded,
        scores=scores,
        logits=logits,
        acceptance=[row.counts for row in rows],
        lossy_options=rules.lossy_options,
    )
