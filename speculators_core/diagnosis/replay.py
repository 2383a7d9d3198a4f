"""Replays known texts for a draft, without the verifier.

One pass of the verifier over a text gives every state that a draft can read. A draft is then
stepped through the text as the reference decoder steps it, and its proposals are compared with
the text. So a draft can be tried in many variants for the price of one verifier pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from speculators_core.decoding.acceptance import AcceptanceCounts
from speculators_core.decoding.drafter import Chooser, Confirmed, Drafter, Proposal
from speculators_core.verifier.taps import LayerTaps


@dataclass(frozen=True)
class SeenText:
    """A prompt, the verifier's greedy answer, and the verifier's states of all of it."""

    token_ids: Int[Tensor, "seq"]
    prompt_length: int
    states: dict[int, Float[Tensor, "seq hidden"]]
    """States by layer id; n is the state before the final norm."""

    def aux_states(self, layer_ids: Sequence[int], shift: int = 0) -> Float[Tensor, "seq aux"]:
        """The states of these layers side by side; of the token ``shift`` places further on."""
        states = torch.cat([self.states[layer_id] for layer_id in layer_ids], dim=-1)
        index = torch.arange(len(states), device=states.device) + shift
        return states[index.clamp(0, len(states) - 1)]


@torch.no_grad()
def see(verifier: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> SeenText:
    """Runs the verifier once over a prompt and its answer."""
    token_ids = torch.tensor([*prompt, *answer], device=verifier.device)
    layer_ids = range(verifier.config.get_text_config().num_hidden_layers + 1)
    with LayerTaps(verifier, layer_ids) as taps:
        verifier(input_ids=token_ids[None], use_cache=False, logits_to_keep=1)
        states = {layer_id: taps.states([layer_id])[0] for layer_id in layer_ids}
    return SeenText(token_ids, len(prompt), states)


@dataclass(frozen=True)
class Reading:
    """A draft, and the states that it reads."""

    drafter: Drafter
    layer_ids: tuple[int, ...] | None = None
    """The verifier's layers that they come from; the draft's `aux_layer_ids` where None."""
    shift: int = 0
    """Places further on of the token that they belong to."""
    window: int | None = None
    """Tokens that the draft sees before its own, at positions from 0; all of the text where None.
    """

    def step_through(self, text: SeenText) -> "Stepper":
        layer_ids = self.drafter.aux_layer_ids if self.layer_ids is None else self.layer_ids
        states = text.aux_states(layer_ids, self.shift)
        return Stepper(self.drafter, text.token_ids, states, self.window)


READ_AT_ONCE = 2048
"""Most tokens that a draft reads at one time: attention among them takes their square."""


class Stepper:
    """Gives a draft a text, piece by piece."""

    def __init__(
        self,
        drafter: Drafter,
        token_ids: Int[Tensor, "seq"],
        states: Float[Tensor, "seq aux_hidden"],
        window: int | None = None,
    ):
        self.drafter, self.window = drafter, window
        self.token_ids = token_ids.to(drafter.device)
        self.states = states.to(drafter.device, drafter.dtype)
        self.positions = torch.arange(len(token_ids), device=drafter.device)
        self.state = drafter.start_drafting()
        self.first = 0

    def propose(self, bonus: int, num_tokens: int, choose: Chooser) -> Int[Tensor, "draft"]:
        """The draft's tokens after the one at place ``bonus``, the last that it knows.

        Places must ascend from call to call.
        """
        if self.window is not None:  # the draft forgets, and begins again where the window does
            self.state = self.drafter.start_drafting()
            self.first = max(0, bonus + 1 - self.window)
            self.positions = torch.arange(len(self.token_ids), device=self.drafter.device)
            self.positions -= self.first
        while bonus - self.first > READ_AT_ONCE:
            self._propose(self.first + READ_AT_ONCE, 1, Chooser())
        return self._propose(bonus, num_tokens, choose)

    def _propose(self, bonus: int, num_tokens: int, choose: Chooser) -> Int[Tensor, "draft"]:
        news = slice(self.first, bonus)
        confirmed = Confirmed(
            self.token_ids[None, self.first : bonus + 1],
            self.positions[None, news],
            self.states[None, news],
        )
        self.first = bonus
        return self.drafter.propose(self.state, confirmed, num_tokens, choose).token_ids[0]


def replay(
    reading: Reading, text: SeenText, num_tokens: int, least_context: int = 0
) -> AcceptanceCounts:
    """Accepted tokens of each draft over a text, as the reference decoder would count them.

    Drafts whose last token would lie after the text's end are left out, as are those with fewer
    than ``least_context`` tokens before them.
    """
    counts, stepper = AcceptanceCounts(num_tokens), reading.step_through(text)
    bonus = max(text.prompt_length, least_context - 1)
    while bonus + num_tokens + 1 < len(text.token_ids):
        drafted = stepper.propose(bonus, num_tokens, Chooser())
        agrees = drafted == stepper.token_ids[bonus + 1 : bonus + 1 + num_tokens]
        kept = int(agrees.long().cumprod(0).sum())
        counts.accepted.append(kept)
        bonus += kept + 1
    return counts


def replay_all(reading: Reading, texts: Sequence[SeenText], num_tokens: int) -> AcceptanceCounts:
    """The drafts of all texts together."""
    counts = [replay(reading, text, num_tokens).accepted for text in texts]
    return AcceptanceCounts(num_tokens, [kept for one in counts for kept in one])


@dataclass(frozen=True)
class _FirstLogits(Chooser):
    """Keeps the logits of the first token that is chosen."""

    seen: list[Tensor] = field(default_factory=list)
    token_ids: list[Tensor | None] = field(default_factory=list)

    def __call__(
        self, logits: Tensor, token_ids: Tensor | None = None, vocab_size: int | None = None
    ) -> Proposal:
        self.seen.append(logits[0, 0])
        self.token_ids.append(token_ids)
        return super().__call__(logits, token_ids, vocab_size)

    def log_prob(self, token_id: Int[Tensor, ""]) -> Tensor:
        """Log-probability of the verifier's token; of the least likely one where it has none."""
        log_probs = self.seen[0].float().log_softmax(-1)
        if self.token_ids[0] is None:
            return log_probs[token_id]
        places = (self.token_ids[0] == token_id).nonzero()
        return log_probs[places[0, 0]] if len(places) else log_probs.min()


def first_token_log_probs(reading: Reading, text: SeenText) -> Float[Tensor, "places"]:
    """The draft's log-probability of the verifier's token, for each token of the answer but one.

    A finer measure than accepted tokens. The answer's first token comes from prefill.
    """
    stepper, log_probs = reading.step_through(text), []
    for bonus in range(text.prompt_length, len(text.token_ids) - 1):
        choose = _FirstLogits()
        stepper.propose(bonus, 1, choose)
        log_probs.append(choose.log_prob(stepper.token_ids[bonus + 1]))
    return torch.stack(log_probs).cpu()
