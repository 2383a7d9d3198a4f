"""Which proposed tokens the verifier keeps: pure functions on tensors."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Acceptance:
    """What one verifier step decided, for each row of a batch."""

    num_accepted: Int[Tensor, "batch"]
    next_token: Int[Tensor, "batch"]
    """The verifier's own token after the kept ones (the bonus token)."""


def accept_greedy(
    draft_tokens: Int[Tensor, "batch draft"],
    verifier_logits: Float[Tensor, "batch draft_plus_one vocab"],
) -> Acceptance:
    """Length of the draft's prefix that the verifier agrees with, and the verifier's next token.

    draft [7 3 9 2], verifier [7 3 5 2 8] -> 2 kept, next is 5
    """
    verifier_tokens = verifier_logits.argmax(-1)  # [batch, draft + 1]
    agrees = draft_tokens == verifier_tokens[:, :-1]
    num_accepted = agrees.long().cumprod(-1).sum(-1)  # [batch]
    next_token = verifier_tokens.gather(1, num_accepted[:, None]).squeeze(1)
    return Acceptance(num_accepted, next_token)
