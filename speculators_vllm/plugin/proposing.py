"""Wrappers for drafts beside vLLM's other features."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    GetToken = Callable[[CachedRequestState, int], int]
    Share = Callable[[SpecDecodeBaseProposer, nn.Module], None]

UNKNOWN_TOKEN = 0


def sharing_without_adapters(original: "Share") -> "Share":
    """The draft shares the verifier's embeddings and head, but not the LoRA adapters around them.

    An adapter's layer expects one row for each token of the verifier's batch; a draft's batch has
    others, and the engine dies. vLLM's V2 runner shares as this wrapper does.
    """

    def share(self: "SpecDecodeBaseProposer", target_language_model: nn.Module) -> None:
        with _without_adapters(target_language_model):
            original(self, target_language_model)

    return share


def naming_unknown_tokens(original: "GetToken") -> "GetToken":
    """Gives the tokens of a prompt that came as embeddings a name.

    vLLM looks up each request's last token, to draft from it where a sample is discarded. For such
    a prompt it raises an error, and the engine dies. The verifier does not see this token.
    """

    def get_token_id(self: "CachedRequestState", idx: int) -> int:
        if self.prompt_token_ids is None and idx < self.num_prompt_tokens:
            return UNKNOWN_TOKEN
        return original(self, idx)

    return get_token_id


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """The model's ends without adapters, for the time being."""
    from vllm.lora.layers.base import BaseLayerWithLoRA  # networks, where there are any

    wrapped = [
        (parent, name, child)
        for parent in (model, getattr(model, "model", None))
        if isinstance(parent, nn.Module)
        for name, child in parent.named_children()
        if isinstance(child, BaseLayerWithLoRA)
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, child.base_layer)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)
