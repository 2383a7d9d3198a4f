"""Proof that a verifier's head gives its logits."""

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from speculators_core.errors import SpeculatorError, first_line
from speculators_core.verifier.head import SOFT_CAPS, VerifierHead, _output_embeddings, decoder_of
from speculators_core.verifier.taps import LayerTaps

LOGIT_SETTINGS = (*SOFT_CAPS, "logit_scale", "logits_scaling")
"""What `VerifierHead` reads of a config, and not every class heeds."""
PROVEN_FAMILIES: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": (),
    "MistralForCausalLM": (),
    "Qwen2ForCausalLM": (),
    "Qwen3ForCausalLM": (),
    "Qwen3MoeForCausalLM": (),
    "Qwen3NextForCausalLM": (),
    "Qwen3_5ForCausalLM": (),
    "Gemma2ForCausalLM": ("final_logit_softcapping",),
    "Gemma3ForCausalLM": ("final_logit_softcapping",),
    "GptOssForCausalLM": (),
    "Gemma3ForConditionalGeneration": (),
    "Qwen2_5_VLForConditionalGeneration": (),
    "Qwen3VLForConditionalGeneration": (),
}
"""Transformers classes for which the tests prove `VerifierHead`, and the settings they heed."""
TRIED_TOKENS = 16
"""Tokens on which a family's logits are compared, and the vocabulary of its twin."""


def check_head(model: PreTrainedModel) -> None:
    """Compares a live verifier's logits with those that its `VerifierHead` gives, on a few tokens.

    Nothing is run for a family that the tests prove. `read_verifier_head` makes its own check.

    Raises:
        SpeculatorError: they differ.
    """
    if not _is_proven(model):
        _compare_logits(model)


def _is_proven(model: PreTrainedModel) -> bool:
    kind = type(model)
    if kind.__name__ not in PROVEN_FAMILIES or not kind.__module__.startswith("transformers."):
        return False
    text_config = model.config.get_text_config()
    present = {name for name in LOGIT_SETTINGS if getattr(text_config, name, None) is not None}
    return present <= set(PROVEN_FAMILIES[kind.__name__])


def _compare_logits(model: PreTrainedModel) -> None:
    embeddings = model.get_input_embeddings().weight
    tokens = torch.arange(TRIED_TOKENS, device=embeddings.device)[None] % len(embeddings)
    last = len(decoder_of(model).layers)
    with torch.no_grad(), LayerTaps(model, [last]) as taps:
        own = model(input_ids=tokens, use_cache=False).logits.float()
        rebuilt = VerifierHead(model)(taps.states([last])).float().to(own.device)
    # Equal steps in equal order: what remains is the rounding of the last product.
    tolerance = max(1e-5, 4 * torch.finfo(embeddings.dtype).eps)
    bound = tolerance * own.abs().max().item()
    same_shape = own.shape == rebuilt.shape
    difference = (own - rebuilt).abs().max().item() if same_shape else float("inf")
    if not difference < bound:  # nor where either is not a number
        raise SpeculatorError(
            f"{type(model).__name__}: its logits and those rebuilt from its last hidden state "
            f"differ by {difference:.3g} (bound {bound:.3g}): its class has a step between final "
            "norm and logits that is not supported. Choose a verifier of another family, or add "
            f"that step to VerifierHead in {VerifierHead.__module__}."
        )


def _check_twin(model: PreTrainedModel) -> None:
    """Compares the logits of a model that has no weights yet, after giving it a few random ones.

    Its layers go and its vocabulary shrinks. Other modules get their weights, at real width, as
    they are called: what a text does not pass (a vision tower) is never allocated.

    Raises:
        SpeculatorError: the logits differ, or the class does not run without its layers.
    """
    stack = decoder_of(model)
    setattr(stack.module, stack.layers_name, nn.ModuleList())
    embeddings, head = model.get_input_embeddings(), _output_embeddings(model)
    generator = torch.Generator().manual_seed(0)
    made: dict[Tensor, Tensor] = {}  # tied weights stay tied

    def give_weights(module: nn.Module, _: object = None) -> None:
        rows = TRIED_TOKENS if module in (embeddings, head) else None
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
            rows = rows or 2 * TRIED_TOKENS  # of positions, some families leave the first ones out
        for key, weight in [*module.named_parameters(recurse=False)]:
            if weight.is_meta:
                if weight not in made:
                    made[weight] = nn.Parameter(_random(weight, rows, generator))
                setattr(module, key, made[weight])
        for key, buffer in [*module.named_buffers(recurse=False)]:
            if buffer.is_meta:
                setattr(module, key, _random(buffer, None, generator))

    for module in model.modules():
        module.register_forward_pre_hook(give_weights)
    give_weights(embeddings)
    give_weights(head)
    try:
        _compare_logits(model.eval())
    except SpeculatorError:
        raise
    except Exception as error:  # whatever the class says to having no layers
        raise SpeculatorError(
            f"{type(model).__name__}: cannot compare its logits with those rebuilt from its last "
            f"hidden state ({first_line(error)}). Attach the loaded verifier instead of its name."
        ) from error


def _random(like: Tensor, rows: int | None, generator: torch.Generator) -> Tensor:
    """Gains around one, matrices that keep the size of what they are applied to.

    ``rows`` are the most that it has.
    """
    shape = like.shape if rows is None else (min(len(like), rows), *like.shape[1:])
    if not like.is_floating_point():
        return torch.ones(shape, dtype=like.dtype)
    if like.ndim < 2:
        return torch.rand(shape, generator=generator) + 0.5
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5
