"""A Transformers cache with rows of different lengths."""

import inspect
from collections.abc import Collection

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from speculators_core.errors import SpeculatorError


class RowCache:
    """The tokens that a language model has read of each text; the last ones can be taken back.

    Rows are aligned to the right. A window is a mask over the whole cache, not a smaller cache, so
    that what rejected tokens pushed out of it comes back when they are forgotten.

        kept tokens   a0 a1 a2 a3 a4     after forgetting 1 and 2:   a0 a1 a2 a3
                       .  . b0 b1 b2                                  .  .  . b0
    """

    def __init__(self, model: PreTrainedModel):
        check_can_forget(type(model), model.config)
        self.model = model
        self.accepted = _parameters(type(model))
        self.cache = DynamicCache()
        self.is_token: Bool[Tensor, "batch length"] | None = None

    def run(
        self,
        token_ids: Int[Tensor, "batch new"],
        is_token: Bool[Tensor, "batch new"] | None = None,
        logits_to_keep: int = 0,
    ) -> Float[Tensor, "batch kept vocab"]:
        """Reads further tokens; where ``is_token`` is given, those alone are tokens.

        Logits are those of the last ``logits_to_keep``, of all for 0.
        """
        if is_token is None:
            is_token = torch.ones_like(token_ids, dtype=torch.bool)
        old = [] if self.is_token is None else [self.is_token]
        self.is_token = torch.cat([*old, is_token], dim=1)
        positions = (self.is_token.cumsum(1) - 1).clamp_min(0)
        further = {
            "position_ids": positions[:, -token_ids.shape[1] :],
            "logits_to_keep": logits_to_keep,
        }
        output = self.model(
            token_ids,
            attention_mask=None if self.is_token.all() else self.is_token.long(),
            past_key_values=self.cache,
            use_cache=True,
            # Families with ALiBi have no positions.
            **{name: value for name, value in further.items() if name in self.accepted},
        )
        return output.logits[:, -logits_to_keep:]

    def forget(self, counts: Int[Tensor, "batch"]) -> None:
        """Takes the last tokens of each row back."""
        assert self.is_token is not None
        fewest = int(counts.min())
        if fewest > 0:
            self.cache.crop(-fewest)
            self.is_token = self.is_token[:, :-fewest]
        further = counts - fewest
        if not further.any():
            return
        # Rows that forget more move to the right, over what they forget.
        source = torch.arange(self.is_token.shape[1], device=counts.device) - further[:, None]
        is_token = self.is_token.gather(1, source.clamp_min(0)) & (source >= 0)
        first = int(is_token.any(0).long().argmax())
        self.is_token = is_token[:, first:]
        index = source[:, None, first:, None].clamp_min(0)
        for layer in self.cache.layers:
            layer.keys = layer.keys.take_along_dim(index, 2)
            layer.values = layer.values.take_along_dim(index, 2)

    def select_rows(self, rows: Int[Tensor, "rows"]) -> None:
        """Keeps these rows of the batch alone."""
        if self.is_token is not None:
            self.is_token = self.is_token[rows]
            self.cache.batch_select_indices(rows)


def check_can_forget(model_class: type, config: PretrainedConfig) -> None:
    """Raises SpeculatorError unless tokens can be taken out of what such a model keeps of a text.

    Recurrent layers (Mamba, linear attention, short convolutions) fold them into one state.
    """
    layers = DynamicCache(config=config.get_text_config()).layers
    is_plain = {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    is_stateful = getattr(model_class, "_is_stateful", False)
    has_cache = "past_key_values" in _parameters(model_class)
    if is_plain and not is_stateful and has_cache:
        return
    raise SpeculatorError(
        f"{model_class.__name__} keeps more than keys and values, a state that rejected "
        "tokens cannot be taken out of; the reference decoder needs plain attention layers."
    )


def _parameters(model_class: type) -> Collection[str]:
    """Names that its ``forward`` takes; of a wrapper without named arguments all that we pass."""
    found = inspect.signature(model_class.forward).parameters.keys()  # type: ignore[attr-defined]
    return found if "input_ids" in found else ("past_key_values", "position_ids", "logits_to_keep")
