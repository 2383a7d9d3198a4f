"""The draft vocabulary and its maps to the verifier's.

verifier ids   0 1 2 3 4 5      t2d   [0 1 0 1 1 0]   is verifier token j drafted?
draft ids        0   1 2        d2t   [1 2 2]         verifier id minus draft id
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speculators_core.errors import SpeculatorError


@dataclass(frozen=True)
class Vocabulary:
    """The sizes of a draft's vocabulary and of its verifier's."""

    size: int
    verifier_size: int

    @property
    def is_whole(self) -> bool:
        """The draft can propose every token of the verifier."""
        return self.size == self.verifier_size


def choose_draft_vocabulary(
    counts: Mapping[int, int], draft_vocab_size: int, vocab_size: int, always: Iterable[int] = ()
) -> tuple[Bool[Tensor, "vocab"], Int[Tensor, "draft_vocab"]]:
    """The most frequent tokens as ``(t2d, d2t)``; ``always`` are kept whatever their count.

    Ties and unseen tokens go by lower id.

    Raises:
        ValueError: the draft vocabulary is larger than the verifier's, or smaller than ``always``.
    """
    kept = set(always)
    if not len(kept) <= draft_vocab_size <= vocab_size:
        raise ValueError(
            f"draft_vocab_size {draft_vocab_size} must lie between the {len(kept)} tokens that "
            f"are always kept and the verifier's {vocab_size}"
        )
    by_count = sorted(range(vocab_size), key=lambda i: (i not in kept, -counts.get(i, 0), i))
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[by_count[:draft_vocab_size]] = True
    return t2d, d2t_from_t2d(t2d)


def count_trained_tokens(documents: Iterable[Mapping[str, Sequence[int]]]) -> Counter[int]:
    """How often each token is one that the draft learns to propose.

    Documents have ``input_ids`` and a ``loss_mask`` of the same length.
    """
    counts: Counter[int] = Counter()
    for document in documents:
        pairs = zip(document["input_ids"], document["loss_mask"], strict=True)
        counts.update(token for token, is_trained in pairs if is_trained)
    return counts


def special_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> set[int]:
    """Tokens that no text spells: ends of turns, tool tags, masks. A draft must know them all.

    Those beyond the model's ``vocab_size``, which some tokenizers have for images, are left out:
    the verifier cannot propose them either.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return {token for token in special if token < vocab_size}


def d2t_from_t2d(t2d: Bool[Tensor, "vocab"]) -> Int[Tensor, "draft_vocab"]:
    ids = t2d.nonzero().flatten()
    return ids - torch.arange(len(ids), device=ids.device)


def check_vocabulary(t2d: Bool[Tensor, "vocab"], d2t: Int[Tensor, "draft_vocab"]) -> None:
    """Raises SpeculatorError unless the two maps say the same."""
    ids = d2t.cpu() + torch.arange(len(d2t))
    if not torch.equal(ids, t2d.cpu().bool().nonzero().flatten()):
        raise SpeculatorError(
            "d2t and t2d contradict each other: draft id + d2t must list, ascending, the tokens "
            "that t2d marks. One of them was made for another draft; restore the pair that the "
            "draft was trained with.",
            cause="d2t offset",
        )
