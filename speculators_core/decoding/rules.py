"""How a request's tokens are chosen and ended."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process
from transformers.generation.streamers import BaseStreamer

from speculators_core.decoding.acceptance import Acceptance, accept_greedy, accept_sampled
from speculators_core.decoding.drafter import Chooser, Proposal
from speculators_core.format.proposals import (
    GreedyTokenProposalConfig,
    SamplingTokenProposalConfig,
    TokenProposalConfig,
)

STATELESS_PROCESSORS = {
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
}
"""Processors that read the scores alone, not the text before them."""


@dataclass(frozen=True)
class Rules:
    """How scores become tokens, and when a text ends."""

    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: GenerationConfig
    proposal: TokenProposalConfig
    num_tokens: int
    generator: torch.Generator | None = None
    streamer: BaseStreamer | None = None

    def __post_init__(self) -> None:
        if self.lossy_options and self.config.do_sample:
            raise ValueError(
                f"{', '.join(self.lossy_options)}: for greedy decoding alone; pass do_sample=False"
            )
        for processor in self.logits_processor:
            if isinstance(processor, logits_process.SynthIDTextWatermarkLogitsProcessor):
                raise ValueError("watermarking_config: SynthID would count rejected tokens too")

    @cached_property
    def lossy_options(self) -> dict[str, int | float] | None:
        """Options that let the output differ from the verifier's; None where it does not."""
        return self.proposal.lossy_options or None

    @cached_property
    def pad_token_id(self) -> int | None:
        """The token that follows an end token; None where no token ends a text.

        Without one a row that another criterion ended continues until every row has ended, as in
        Transformers.
        """
        ends = [c.eos_token_id for c in self.stopping_criteria if hasattr(c, "eos_token_id")]
        if not ends:
            return None
        pad = self.config.pad_token_id
        return int(ends[0].flatten()[0] if pad is None else pad)

    @property
    def keeps_scores(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_scores)

    @property
    def keeps_logits(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_logits)

    @cached_property
    def choose(self) -> Chooser:
        if isinstance(self.proposal, SamplingTokenProposalConfig):
            return Chooser(self.proposal.temperature, self.generator)
        return Chooser()

    def accept(self, proposal: Proposal, scores: Float[Tensor, "batch places vocab"]) -> Acceptance:
        if self.config.do_sample:
            probs = scores.float().softmax(-1)
            return accept_sampled(proposal.token_ids, proposal.probs, probs, self.generator)
        if isinstance(self.proposal, GreedyTokenProposalConfig):
            accept_k, tolerance = self.proposal.verifier_accept_k, self.proposal.accept_tolerance
            return accept_greedy(proposal.token_ids, scores, accept_k, tolerance)
        return accept_greedy(proposal.token_ids, scores)
