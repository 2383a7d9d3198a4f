"""Acceptance of a draft in training: decoded, and predicted.

The figures that a model's ``forward`` returns are teacher-forced: all tokens before the judged one
come from the text. These are the figures of acceptance instead, of the draft as it is served, where
each token follows the draft's previous output:

    acceptance_length            prompts decoded with the verifier, by the reference decoder
    joint_k, conditional_k       the same by position, k from 1
    context_C_...                the same of drafts with C tokens before them, as 128-512, and
                                 num_drafts, their number
    predicted_...                the same of roll-outs over held-out examples; see `rollout`
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, pairwise, takewhile
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.packing import RowLayout
from speculators_core.decoding.acceptance import (
    CONTEXT_BUCKETS,
    AcceptanceCounts,
    Cell,
    merge_contexts,
    worst_cell,
)
from speculators_core.decoding.generation import neutral_generation
from speculators_core.decoding.prompts import Prompt, read_prompts, tokenize
from speculators_core.diagnosis.rollout import (
    UNKNOWN,
    SurvivalCounts,
    VerifiedText,
    bonus_places,
    reachable_positions,
    roll_out,
    share_drafts,
)
from speculators_core.errors import SpeculatorError
from speculators_core.format.proposals import GreedyTokenProposalConfig
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.training.settings import EvaluationConfig
from speculators_core.verifier.head import VerifierHead
from speculators_core.verifier.reading import read_tokenizer

Figure = TypeVar("Figure")

DECODED_AT_ONCE = 4
"""Prompts of one batch of the reference decoder. On a CPU core 16 of the playground's prompts take
EAGLE-3 8 s so, 14 s one by one and 10 s all at once; in a batch the rows wait for the slowest."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class HeldOut:
    """Examples that are not trained on; in memory, or mapped from a store."""

    examples: Sequence[GeneratedExample]
    schema: Schema


# ---- prompts ----


def named_prompts(section: EvaluationConfig) -> list[Prompt]:
    """The prompts of ``section.prompts`` to decode, at even distances; empty where it is not set.

    Raises:
        SpeculatorError: they cannot be read.
    """
    if section.prompts is None or not section.decode:
        return []
    rows = {prompt.model_dump_json(): prompt for prompt in read_prompts(section.prompts)}
    return _spread(list(rows.values()), section.num_prompts)


def choose_prompts(
    section: EvaluationConfig,
    examples: Sequence[GeneratedExample],
    verifier: str,
    max_length: int,
    trust_remote_code: bool = False,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Token ids of the prompts to decode: distinct ones, at most ``section.num_prompts``.

    They are those of ``section.prompts`` under the chat template of ``verifier`` (folder or hub
    id), or the text before the first trained token of each example; of an example that is trained
    from its start (plain text) it is the first quarter. Where there are too many they are taken at
    even distances, so that a file sorted by category is sampled in all categories. ``max_length``
    is the number of positions of the verifier, ``vocab_size`` that of its tokens.

    Raises:
        SpeculatorError: the prompts or the tokenizer cannot be read, or there is no prompt at all.
    """
    if section.prompts is not None:
        tokenizer = read_tokenizer(verifier, trust_remote_code)
        tokenized = tokenize(
            named_prompts(section), tokenizer, max_length, section.template_options, vocab_size
        )
        found = [prompt.token_ids for prompt in tokenized]
    else:
        found = [_beginning(example, max_length // 2) for example in examples]
    unique = [list(ids) for ids in dict.fromkeys(map(tuple, found)) if ids]
    if not unique:
        raise SpeculatorError(
            f"evaluation.decode has no prompts: none of {len(examples)} held-out examples begins "
            "with one. Set evaluation.prompts, raise data.eval_examples, or set evaluation.decode "
            "to false."
        )
    return _spread(unique, section.num_prompts)


def _beginning(example: GeneratedExample, most: int) -> list[int]:
    """The example's prompt; empty where it has none, or one of more than ``most`` tokens."""
    trained = example.loss_mask.nonzero().flatten()
    if not len(trained):
        return []
    first = int(trained[0])
    if first <= 1:  # plain text, whose first token nobody can predict
        first = max(1, min(len(example.input_ids) // 4, most))
    return example.input_ids[:first].tolist() if first <= most else []


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the items at even distances; all where there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


# ---- decoding ----


@contextmanager
def measuring(draft: SpeculatorModel) -> Iterator[None]:
    """No gradients and no dropout inside; modes and random generators are restored afterwards."""
    modes = [(module, module.training) for module in draft.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [draft.device] if draft.device.type == "cuda" else []
    draft.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def decode_prompts(
    draft: SpeculatorModel, prompts: Sequence[Sequence[int]], max_tokens: int
) -> SurvivalCounts:
    """Counts of accepted tokens over the verifier's greedy answers, by the reference decoder.

    A prompt's first token comes from prefill and does not count; the last step counts whole. The
    draft proposes greedily, as many tokens as its config states, whatever its proposal method is.
    Weights keep their type.

    Raises:
        SpeculatorError: the draft has no verifier attached in full.
    """
    num_tokens = draft.config.proposal.speculative_tokens
    counts, contexts = AcceptanceCounts(num_tokens), []
    ordered = sorted(prompts, key=len)  # prompts of a batch are padded to the longest
    with measuring(draft), neutral_generation(draft.verifier):
        for first in range(0, len(ordered), DECODED_AT_ONCE):
            group = ordered[first : first + DECODED_AT_ONCE]
            longest = max(map(len, group))
            ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in group]
            mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in group]
            device = draft.verifier.device
            output = draft.generate(
                torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                proposal=GreedyTokenProposalConfig(speculative_tokens=num_tokens),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
            )
            for prompt, row in zip(group, output.acceptance, strict=True):
                counts.accepted.extend(row.accepted)
                contexts.append(row.by_context(len(prompt)))
    return SurvivalCounts.of(counts, merge_contexts(contexts, num_tokens))


# ---- roll-outs ----


def roll_out_held_out(
    draft: SpeculatorModel, held_out: HeldOut, count: int, rank: int = 0, world: int = 1
) -> SurvivalCounts:
    """Survival of at most ``count`` drafts over the examples; the same drafts in each call.

    Rank i of n takes every n-th of the examples that have drafts. The verifier's head must be
    attached; its tokens follow from the stored states, in the type of the head.

    Raises:
        SpeculatorError: the schema lacks a state that the draft reads.
    """
    num_tokens = draft.config.proposal.speculative_tokens
    layout = RowLayout.of(held_out.schema, draft.aux_layer_ids, None)
    places = [bonus_places(example.loss_mask).tolist() for example in held_out.examples]
    shares = share_drafts(list(map(len, places)), count)
    drawn = [at for at, share in enumerate(shares) if share]
    total = SurvivalCounts.none(num_tokens)
    with measuring(draft):
        for at in drawn[rank::world]:
            example, share = held_out.examples[at], shares[at]
            reached, rows = reachable_positions(
                places[at], share, num_tokens, len(example.input_ids)
            )
            text = _verified_text(example, layout, draft.verifier_head, rows)
            total += roll_out(draft, text, reached, num_tokens, share)
    return total


def _verified_text(
    example: GeneratedExample,
    layout: RowLayout,
    head: VerifierHead,
    rows: Sequence[int],
) -> VerifiedText:
    """The example with the verifier's next tokens at these rows."""
    aux, last = list(layout.aux_slots), layout.last_slot
    choices = torch.full_like(example.input_ids, UNKNOWN)
    index = torch.tensor(rows, device=choices.device)
    choices[index] = greedy_tokens(head, example.hidden_states[index, last]).to(choices.device)
    return VerifiedText(example.input_ids, example.hidden_states[:, aux].flatten(1), choices)


@torch.no_grad()
def greedy_tokens(
    head: VerifierHead, last_hidden_states: Float[Tensor, "rows hidden"]
) -> Int[Tensor, "rows"]:
    """The verifier's token after each state; logits are made for a few rows at a time."""
    return torch.cat([logits.argmax(-1) for logits in head.chunks(last_hidden_states)])


# ---- figures ----


def measure_acceptance(
    draft: SpeculatorModel,
    prompts: Sequence[Sequence[int]],
    held_out: HeldOut,
    section: EvaluationConfig,
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """Figures of acceptance over the prompts and examples of all ranks; the same on each rank.

    All ranks of `torch.distributed` call it, with a plain draft: one sharded by FSDP2 cannot
    decode. Each takes its share of the prompts and examples, which are the same on all ranks; of a
    stream each rank has its own. Figures without counts are left out: without ``section.decode`` or
    ``section.roll_outs``, a conditional rate that no draft reached, or all where every answer ended
    with its first token.
    """
    decoded = rolled = SurvivalCounts.none(draft.config.proposal.speculative_tokens)
    if section.decode:
        decoded = decode_prompts(draft, prompts[rank::world], section.max_tokens)
    if section.roll_outs:
        rolled = roll_out_held_out(draft, held_out, section.roll_outs, rank, world)
    if torch.distributed.is_initialized():
        decoded, rolled = (_sum_over_ranks(counts, draft.device) for counts in (decoded, rolled))
    return {**_figures(decoded), **_figures(rolled, "predicted_")}


def _sum_over_ranks(counts: SurvivalCounts, device: torch.device) -> SurvivalCounts:
    none = SurvivalCounts.none(len(counts.at_risk))
    parts = [counts, *(counts.contexts.get(name, none) for name in CONTEXT_BUCKETS)]
    table = torch.tensor([[part.at_risk, part.right] for part in parts], device=device)
    torch.distributed.all_reduce(table)
    total, *by_context = [SurvivalCounts(tuple(a), tuple(b)) for a, b in table.tolist()]
    named = zip(CONTEXT_BUCKETS, by_context, strict=True)
    contexts = {name: part for name, part in named if part.num_places}
    return replace(total, contexts=contexts)


def _figures(counts: SurvivalCounts, prefix: str = "") -> dict[str, float]:
    """Figures by name, for the log; empty where there was no draft."""
    if not counts.num_places:
        return {}
    joint = {f"{prefix}joint_{k}": rate for k, rate in enumerate(counts.joint, start=1)}
    conditional = {
        f"{prefix}conditional_{k}": rate
        for k, rate in enumerate(counts.conditional, start=1)
        if rate is not None
    }
    found = {f"{prefix}acceptance_length": counts.acceptance_length, **joint, **conditional}
    for name, part in counts.contexts.items():
        start = f"{prefix}{_context_key(name)}"
        found |= {f"{start}num_drafts": float(part.num_places), **_figures(part, start)}
    return found


def _context_key(context: str) -> str:
    """The start of a range's figures, in characters that every tracker takes."""
    return f"context_{context.replace('<', '0-').replace('+', '-up')}_"


def counts_by_context(figures: Mapping[str, float], prefix: str = "") -> dict[str, list[int]]:
    """Decoded drafts of each range of context lengths, and those kept up to each position.

    From figures of `measure_acceptance` whose names begin with ``prefix``; ranges without drafts
    are left out.
    """
    found = {}
    for name in CONTEXT_BUCKETS:
        start = f"{prefix}{_context_key(name)}"
        num_drafts = figures.get(f"{start}num_drafts", 0.0)
        names = takewhile(figures.__contains__, (f"{start}joint_{k}" for k in count(1)))
        if kept := [round(num_drafts * figures[joint]) for joint in names]:
            found[name] = [round(num_drafts), *kept]
    return found


def worst_cell_of(figures: Mapping[str, float], prefix: str = "") -> Cell | None:
    """The worst cell of decoded drafts, from figures of `measure_acceptance`."""
    parts = counts_by_context(figures, prefix)
    return worst_cell({name: pairwise(counts) for name, counts in parts.items()})


def name_teacher_forced(metrics: Mapping[str, Figure]) -> dict[str, Figure]:
    """A model's metrics under names that cannot be mistaken for acceptance; losses keep theirs.

    cond_acc_1 -> teacher_forced_cond_acc_1
    """
    return {
        name if name == "loss" or name.startswith("loss_") else f"teacher_forced_{name}": value
        for name, value in metrics.items()
    }
