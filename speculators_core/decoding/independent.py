"""Untrained drafts: any language model, and prompt lookup.

Trained drafts are compared with them: the same loop, the same counts.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from speculators_core.decoding.drafter import Chooser, Confirmed, Proposal, join
from speculators_core.decoding.row_cache import RowCache
from speculators_core.errors import SpeculatorError


@dataclass
class LanguageModelState:
    """Every confirmed token that the draft model has read, including the bonus token."""

    cache: RowCache

    def select_rows(self, rows: Int[Tensor, "rows"]) -> None:
        self.cache.select_rows(rows)


class LanguageModelDraft:
    """Any causal language model with the verifier's vocabulary (arXiv:2211.17192)."""

    aux_layer_ids: list[int] = []

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()
        self.device, self.dtype = model.device, model.dtype

    def start_drafting(self) -> LanguageModelState:
        return LanguageModelState(RowCache(self.model))

    @torch.no_grad()
    def propose(
        self, state: LanguageModelState, confirmed: Confirmed, num_tokens: int, choose: Chooser
    ) -> Proposal:
        cache, tokens = state.cache, confirmed.token_ids
        is_token = torch.cat([confirmed.positions >= 0, torch.ones_like(tokens[:, :1]).bool()], 1)
        if cache.is_token is not None:  # it has read each row's first one as its last bonus token
            is_token &= is_token.cumsum(1) > 1
            tokens, is_token = tokens[:, 1:], is_token[:, 1:]
        proposals: list[Proposal] = []
        while True:
            logits = cache.run(tokens, is_token, logits_to_keep=1)
            proposals.append(choose(logits[:, -1:]))
            if len(proposals) == num_tokens:
                cache.forget(torch.full_like(tokens[:, 0], num_tokens - 1))
                return join(proposals)
            tokens = proposals[-1].token_ids
            is_token = torch.ones_like(tokens, dtype=torch.bool)


@dataclass
class PromptLookupState:
    """The text of each row so far."""

    texts: list[list[int]] = field(default_factory=list)

    def select_rows(self, rows: Int[Tensor, "rows"]) -> None:
        self.texts = [self.texts[row] for row in rows.tolist()]


class PromptLookupDraft:
    """Prompt lookup: proposes what followed the last tokens where they occurred before.

    The longest match counts, of ``max_matched`` down to ``min_matched`` tokens, and among equal
    ones the latest. Nothing is proposed for a row without a match.
    """

    aux_layer_ids: list[int] = []
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, max_matched: int = 3, min_matched: int = 1):
        if not 1 <= min_matched <= max_matched:
            raise ValueError(
                f"expected 1 <= min_matched <= max_matched, found {min_matched} and {max_matched}"
            )
        self.lengths = range(max_matched, min_matched - 1, -1)

    def start_drafting(self) -> PromptLookupState:
        return PromptLookupState()

    def propose(
        self, state: PromptLookupState, confirmed: Confirmed, num_tokens: int, choose: Chooser
    ) -> Proposal:
        rows = zip(confirmed.token_ids.tolist(), confirmed.positions.tolist(), strict=True)
        new = [
            [*(t for t, at in zip(ids[:-1], places, strict=True) if at >= 0), ids[-1]]
            for ids, places in rows
        ]
        # The first of them was the last bonus token, which each text ends with.
        state.texts = (
            [text[:-1] + tokens for text, tokens in zip(state.texts, new, strict=True)]
            if state.texts
            else new
        )
        found = [self.look_up(text)[:num_tokens] for text in state.texts]
        lengths = torch.tensor([len(tokens) for tokens in found])
        width = int(lengths.max())
        filled = [tokens + [0] * (width - len(tokens)) for tokens in found]
        return Proposal(torch.tensor(filled, dtype=torch.long), num_proposed=lengths)

    def look_up(self, text: list[int]) -> list[int]:
        """The tokens that followed the text's last ones where they occurred before; or none.

        text [7 8 9 1 7 8] -> [9 1 7 8]
        """
        for length in self.lengths:
            pattern = text[-length:]
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] == pattern:
                    return text[start + length :]
        return []


def check_shared_vocabulary(
    draft: PretrainedConfig, draft_name: str, verifier: PretrainedConfig, verifier_name: str
) -> None:
    """Raises SpeculatorError unless the two have as many tokens."""
    sizes = [config.get_text_config().vocab_size for config in (draft, verifier)]
    if sizes[0] != sizes[1]:
        raise SpeculatorError(
            f"{draft_name}: vocabulary of {sizes[0]} tokens, but {verifier_name} has {sizes[1]}. "
            "Pass a draft with its verifier's vocabulary."
        )
