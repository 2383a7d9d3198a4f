"""Wrappers that apply thinking budgets to drafted tokens.

vLLM 0.32's V1 runner keeps one state for each request, and moves it once a step by all tokens that
the step accepted and drafted; where an end of thinking is forced then depends on the drafts, and
texts differ from those without speculation. Without drafts it moves the state token by token. So
does this module: the same transitions, for each token that was accepted, and then on a copy for
each that is drafted. The V2 runner counts tokens for each place, and needs no repair.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    Update = Callable[
        [ThinkingBudgetStateHolder, list[list[int]], list[list[int]] | None, Tensor | None], None
    ]
    Apply = Callable[[ThinkingBudgetStateHolder, Tensor, bool, list[list[int]]], Tensor]

State = dict[str, Any]
"""vLLM's, of one request."""
NUM_SEEN, FORCED = "speculators_vllm_num_seen", "speculators_vllm_forced"
"""Our keys in it: output tokens by which it was moved; tokens forced at the step's places."""
FORCING_LOGIT = 1e9
"""vLLM's."""


def updating(original: "Update") -> "Update":
    """Moves the states, and notes which tokens are forced at the places of this step."""

    def update_state(
        self: "ThinkingBudgetStateHolder",
        output_token_ids: list[list[int]],
        spec_token_ids: list[list[int]] | None,
        repeat_indices: Tensor | None = None,
    ) -> None:
        if not self.in_spec_mode:
            return original(self, output_token_ids, spec_token_ids, repeat_indices)
        drafts = spec_token_ids or []
        for index, state in self._state.items():
            if index < len(output_token_ids):
                drafted = drafts[index] if index < len(drafts) else []
                state[FORCED] = forced_tokens(self, state, output_token_ids[index], drafted)

    return update_state


def forced_tokens(
    holder: "ThinkingBudgetStateHolder",
    state: State,
    output: Sequence[int],
    drafted: Sequence[int],
) -> list[int | None]:
    """The forced token, or None, at each drafted place and at the one after them."""
    for length in range(state.get(NUM_SEEN, -1) + 1, len(output) + 1):
        _move(holder, state, output[:length])
    state[NUM_SEEN] = len(output)
    forced = [_forced_token(holder, state)]
    ahead = state.copy()
    for length in range(1, len(drafted) + 1):
        _move(holder, ahead, [*output, *drafted[:length]])
        forced.append(_forced_token(holder, ahead))
    return forced


def _move(holder: "ThinkingBudgetStateHolder", state: State, output: Sequence[int]) -> None:
    state.update(output_tok_ids=list(output), spec_token_ids=[], force_index=[])
    holder._update_think_state(state)


def _forced_token(holder: "ThinkingBudgetStateHolder", state: State) -> int | None:
    end, place = holder.think_end_token_ids, state["end_count"]
    is_forced = state["in_end"] and state["force_index"] and place < len(end)
    return end[place] if is_forced else None


def applying(original: "Apply") -> "Apply":
    """Forces the tokens that `updating` has noted."""

    def _apply_forcing_to_logits(
        self: "ThinkingBudgetStateHolder",
        logits: Float[Tensor, "tokens vocab"],
        predict_bonus_token: bool,
        spec_token_ids_for_layout: list[list[int]],
    ) -> Float[Tensor, "tokens vocab"]:
        if not self.in_spec_mode:
            return original(self, logits, predict_bonus_token, spec_token_ids_for_layout)
        found = _places(self._state, predict_bonus_token, spec_token_ids_for_layout)
        places = [(row, token) for row, token in found if row < len(logits)]
        if places:
            rows, tokens = torch.tensor(places, device=logits.device).unbind(1)
            logits[rows, tokens] = FORCING_LOGIT
        return logits

    return _apply_forcing_to_logits


def _places(
    states: dict[int, State], is_after_drafts: bool, drafts: Sequence[Sequence[int]]
) -> list[tuple[int, int]]:
    """Rows of the logits with the token that is forced there.

    The sampler is given one row a request, after its drafts; so it is where no request of the
    batch has a draft. The verification is given one for each drafted token.
    """
    if is_after_drafts or not any(drafts):
        last = {index: state.get(FORCED, [None])[-1] for index, state in states.items()}
        return [(index, token) for index, token in last.items() if token is not None]
    places, first = [], 0
    for index, drafted in enumerate(drafts):
        forced = states.get(index, {}).get(FORCED, [])[: len(drafted)]
        places += [(first + at, token) for at, token in enumerate(forced) if token is not None]
        first += len(drafted)
    return places
