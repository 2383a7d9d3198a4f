"""A mask token that no text holds."""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from speculators_core.errors import SpeculatorError

MASK = re.compile(r"[<\[][^\w\s]?mask[^\w\s]?[>\]]", re.IGNORECASE)
RESERVED = re.compile(
    r"[<\[][^\w\s]?(reserved|unused|extra_id|control|special|placeholder)[\w-]*[^\w\s]?[>\]]",
    re.IGNORECASE,
)
"""Names of tokens that makers keep for later: `<|reserved_special_token_0|>`, `<unused7>`."""


@dataclass(frozen=True)
class MaskToken:
    """The chosen token, and why texts do not hold it."""

    token_id: int
    reason: str

    def __str__(self) -> str:
        return f"mask_token_id {self.token_id} ({self.reason})"


def choose_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> MaskToken:
    """The tokenizer's mask, else the first token of those that texts do not hold.

    They are, in this order: one that is called a mask, a reserved one, an id of the embedding
    table that has no token, and a special token that the chat template does not write.

    Raises:
        SpeculatorError: there is none.
    """
    own = tokenizer.mask_token_id
    if own is not None and own < vocab_size:
        return MaskToken(own, f"the tokenizer's mask, {tokenizer.mask_token!r}")
    vocabulary = tokenizer.get_vocab()
    named = sorted((token_id, name) for name, token_id in vocabulary.items())
    templates = str(tokenizer.chat_template)
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    free = [
        (token_id, name)
        for token_id, name in named
        if token_id < vocab_size and token_id not in ends and name not in templates
    ]
    for pattern, reason in ((MASK, "called a mask"), (RESERVED, "reserved")):
        for token_id, name in free:
            if pattern.fullmatch(name):
                return MaskToken(token_id, f"{name!r} is {reason}")
    known = set(vocabulary.values())
    unused = next((token for token in range(len(known), vocab_size) if token not in known), None)
    if unused is not None:
        return MaskToken(unused, "the embedding table has it, the tokenizer does not")
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    for token_id, name in free:
        if token_id in special:
            return MaskToken(token_id, f"{name!r} is an added token that no template writes")
    raise SpeculatorError(
        "mask_token_id is missing, and the verifier's tokenizer has no mask, no reserved token and "
        "no unused id to take. Set it to a token that texts do not hold."
    )
