"""DFlash in vLLM, with every layer's key norm."""

import logging
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM, DFlashQwen3Model

logger = logging.getLogger(__name__)


class DFlashNetwork(DFlashQwen3Model):
    def _normalize_context_k(
        self, all_k: Float[Tensor, "layers context kv_heads head_dim"]
    ) -> Float[Tensor, "layers context kv_heads head_dim"]:
        """Each layer's keys, normed with the layer's weights.

        vLLM hands one kernel the weights of all layers at once. Its CPU kernel (0.32) reads the
        first layer's alone.
        """
        if all_k.device.type != "cpu":
            return super()._normalize_context_k(all_k)
        normed = torch.empty_like(all_k)
        norm_eps = cast(float, self._rms_norm_eps)  # a module's attributes have no types
        for layer, weight in enumerate(self._k_norm_weights):
            ops.rms_norm(normed[layer], all_k[layer], weight, norm_eps)
        return normed


if not hasattr(DFlashQwen3Model, "_normalize_context_k"):
    logger.warning("speculators-vllm found no norm of DFlash's context keys in vLLM to replace")


class DFlashForCausalLM(DFlashQwen3ForCausalLM):
    model_cls = DFlashNetwork
