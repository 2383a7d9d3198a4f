"""The draft vocabulary: a subset of the verifier's tokens, and the way between the two.

verifier ids   0 1 2 3 4 5      t2d   [0 1 0 1 1 0]   is verifier token j drafted?
draft ids        0   1 2        d2t   [1 2 2]         verifier id minus draft id
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speculators_core import checkpoint
from speculators_core.errors import SpeculatorError

TOKENIZER = "tokenizer.json"


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


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that no text spells: ends of turns, tool tags, masks. A draft must know them all."""
    return set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())


def d2t_from_t2d(t2d: Bool[Tensor, "vocab"]) -> Int[Tensor, "draft_vocab"]:
    ids = t2d.nonzero().flatten()
    return ids - torch.arange(len(ids), device=ids.device)


def check_vocabulary(t2d: Bool[Tensor, "vocab"], d2t: Int[Tensor, "draft_vocab"]) -> None:
    """Raises SpeculatorError unless the two maps say the same."""
    ids = d2t.cpu() + torch.arange(len(d2t))
    if not torch.equal(ids, t2d.cpu().bool().nonzero().flatten()):
        raise SpeculatorError(
            "d2t and t2d contradict each other: draft id + d2t must list, ascending, the tokens "
            "that t2d marks. One of them was made for another draft."
        )


def read_tokenizer_vocabulary(folder: str | PathLike) -> dict[str, int] | None:
    """Every token of a local folder's tokenizer with its id; None where there is none to read."""
    path = Path(folder) / TOKENIZER
    if not path.is_file():
        return None
    content = checkpoint.read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # a unigram model's, with scores
            vocabulary = {token: place for place, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return {**vocabulary, **added}
    except (KeyError, TypeError, ValueError):
        return None


def check_tokenizer(
    speculator: str | PathLike, trained_with: str | None, served_with: str | PathLike
) -> None:
    """Compares the served tokenizer with the one beside the speculator, or else its verifier's.

    Only folders within reach are compared; ``trained_with`` is the verifier that the speculator
    names.

    Raises:
        SpeculatorError: a token has another id, or none.
    """
    for source in filter(None, (str(speculator), trained_with)):
        if (trained := read_tokenizer_vocabulary(source)) is None:
            continue
        served = read_tokenizer_vocabulary(served_with)
        if served is None or trained == served:
            return
        by_id = {token_id: token for token, token_id in served.items()}
        for token, token_id in trained.items():
            # A token that one side alone has is harmless: a mask, say, that no text holds.
            if served.get(token, token_id) != token_id or by_id.get(token_id, token) != token:
                raise SpeculatorError(
                    f"{served_with}: token {token_id} is {by_id.get(token_id)!r}; the speculator "
                    f"was trained with {source}, where it is {token!r}. Pass that tokenizer."
                )
        return
