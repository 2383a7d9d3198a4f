"""Untrained drafts: any language model, and prompt lookup.

Trained drafts are compared with them: the same loop, the same counts.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from speculators_core.decoding.acceptance import AcceptanceCounts
from speculators_core.decoding.drafter import Chooser, Confirmed, Proposal, join
from speculators_core.decoding.generation import SpeculativeOutput, generate
from speculators_core.decoding.row_cache import RowCache
from speculators_core.decoding.sequences import until_end
from speculators_core.errors import SpeculatorError
from speculators_core.format.checkpoint import as_dtype
from speculators_core.format.proposals import GreedyTokenProposalConfig
from speculators_core.settings import Settings
from speculators_core.verifier.reading import load_verifier, read_tokenizer


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


# ---- the door for two whole models ----


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


class SpeculativeConfig(Settings):
    """Two language models and how they decode together."""

    main_model_path: str
    """Verifier: a folder or a hub id."""
    draft_model_path: str
    """Draft with the same vocabulary: a folder or a hub id."""
    max_speculative_tokens: int = Field(5, ge=1)
    """Tokens proposed in one step."""
    max_new_tokens: int = Field(128, ge=1)
    """Most new tokens of each text."""
    temperature: float = Field(0.0, ge=0.0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Share of probability that sampling keeps."""
    top_k: int | None = Field(None, ge=1)
    """Tokens that sampling keeps; all where None."""
    seed: int | None = None
    """Seed that makes a sampled run repeatable."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype in which `from_config` loads both models; as stored where auto."""
    device: str = "cpu"
    """Device on which `from_config` puts both models."""


@dataclass(frozen=True)
class SpeculativeResult:
    """The continuation of each prompt."""

    texts: list[str]
    """New text alone, without special tokens."""
    token_ids: list[list[int]]
    acceptance: list[AcceptanceCounts]


class SpeculativeInferenceEngine:
    """A verifier and an independent draft model, with a tokenizer.

    Raises:
        SpeculatorError: the two models do not share a vocabulary.
    """

    def __init__(
        self,
        main_model: PreTrainedModel,
        draft_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SpeculativeConfig,
    ):
        check_shared_vocabulary(
            draft_model.config, config.draft_model_path, main_model.config, config.main_model_path
        )
        self.main_model, self.config = main_model.eval(), config
        self.tokenizer = copy.deepcopy(tokenizer)  # whose padding changes below
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.draft = LanguageModelDraft(draft_model)

    @classmethod
    def from_config(cls, config: SpeculativeConfig) -> "SpeculativeInferenceEngine":
        """Loads both models.

        Raises:
            SpeculatorError: one cannot be read, or their tokenizers differ.
        """
        paths = (config.main_model_path, config.draft_model_path)
        main, draft = (read_tokenizer(path) for path in paths)
        if main.get_vocab() != draft.get_vocab():
            raise SpeculatorError(
                f"{paths[1]}: its tokenizer is not that of {paths[0]}. Pass a draft with its "
                "verifier's tokenizer."
            )
        dtype = None if config.dtype == "auto" else as_dtype(config.dtype)
        main_model, draft_model = (load_verifier(path, dtype).to(config.device) for path in paths)
        return cls(main_model, draft_model, main, config)

    def generate(self, prompts: str | Sequence[str]) -> SpeculativeResult:
        """Continues one prompt or several at once."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokenizer, config = self.tokenizer, self.config
        batch = tokenizer(prompts, return_tensors="pt", padding=True).to(self.main_model.device)
        generator = None
        if config.seed is not None:
            generator = torch.Generator(self.main_model.device).manual_seed(config.seed)
        sampling: dict[str, Any] = {"do_sample": config.temperature > 0}
        if config.temperature > 0:
            sampling |= {
                "temperature": config.temperature,
                "top_p": config.top_p,
                "top_k": config.top_k or 0,
            }
        output = generate(
            self.draft,
            self.main_model,
            GreedyTokenProposalConfig(speculative_tokens=config.max_speculative_tokens),
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=config.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            generator=generator,
            return_dict_in_generate=True,
            **sampling,
        )
        assert isinstance(output, SpeculativeOutput)
        assert output.acceptance is not None
        width = batch["input_ids"].shape[1]
        stop_ids = self.main_model.generation_config.eos_token_id
        new = [until_end(row, stop_ids) for row in output.sequences[:, width:].tolist()]
        return SpeculativeResult(
            tokenizer.batch_decode(new, skip_special_tokens=True), new, output.acceptance
        )
