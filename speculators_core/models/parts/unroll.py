"""Steps of drafts that propose one token after another."""

from collections.abc import Callable, Iterator

from jaxtyping import Float, Int
from torch import Tensor

from speculators_core.batch import Batch
from speculators_core.decoding.drafter import Confirmed, Proposal, join
from speculators_core.models.parts.attention import DraftCache

Hidden = Float[Tensor, "batch rows hidden"]
Step = Callable[
    [Int[Tensor, "batch rows"], Hidden, Int[Tensor, "batch rows"]], tuple[Hidden, Hidden]
]
"""(tokens, states, positions) to the states that the head reads and those that are fed back."""


def unroll(
    batch: Batch,
    hidden: Hidden,
    num_steps: int,
    step: Step,
    predict: Callable[[Hidden], Int[Tensor, "batch rows"]] | None = None,
) -> Iterator[Hidden]:
    """The states that the head reads, step by step; step k has ``seq - 1 - k`` rows.

    Row i of step k reads token i + 1 + k and predicts the one after it. The token is the true one,
    or with ``predict`` the one that the step before predicted.
    """
    output = hidden
    for count in range(min(num_steps, batch.input_ids.shape[1] - 1)):
        tokens = batch.input_ids[:, 1 + count :]
        num_rows = tokens.shape[1]
        if count and predict is not None:
            tokens = predict(output[:, :num_rows])
        positions = batch.position_ids[:, :num_rows] + count
        output, hidden = step(tokens, hidden[:, :num_rows], positions)
        yield output


def propose_in_steps(
    cache: DraftCache,
    confirmed: Confirmed,
    hidden: Hidden,
    num_tokens: int,
    step: Step,
    to_proposal: Callable[[Hidden], Proposal],
) -> Proposal:
    """Reads the confirmed tokens, then each proposal; ``cache`` keeps the confirmed ones alone."""
    tokens, positions = confirmed.token_ids[:, 1:], confirmed.positions
    num_confirmed = cache.length + positions.shape[1]
    proposals: list[Proposal] = []
    while True:
        output, hidden = step(tokens, hidden, positions)
        proposals.append(to_proposal(output[:, -1:]))
        if len(proposals) == num_tokens:
            cache.crop(num_confirmed)
            return join(proposals)
        hidden = hidden[:, -1:]
        tokens, positions = proposals[-1].token_ids, positions[:, -1:] + 1
