"""MTP in vLLM: one block between embeddings and head.

The same network as `speculators_core.models.mtp`; embeddings and head are the verifier's. vLLM runs
it once over the new tokens, with the verifier's states after the final norm, and then token by
token on its output.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    get_draft_quant_config,
    maybe_prefix,
)

from speculators_core.errors import SpeculatorError
from speculators_core.format.checkpoint import HubOptions
from speculators_core.verifier.reading import read_final_norm

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization import QuantizationConfig
    from vllm.model_executor.models.interfaces import MultiModalEmbeddings
    from vllm.sequence import IntermediateTensors

Hidden = Float[Tensor, "tokens hidden"]
VERIFIERS = ("embed_tokens.weight", "lm_head.weight")
"""Tensors that are the verifier's whatever the checkpoint holds."""


class _LlamaBlock(LlamaDecoderLayer):
    """Llama's block as in vLLM's other drafts: with the draft's quantization."""

    def get_quant_config(self, vllm_config: VllmConfig) -> "QuantizationConfig | None":
        return get_draft_quant_config(vllm_config)


def _block(vllm_config: VllmConfig, config: PretrainedConfig, prefix: str) -> nn.Module:
    if config.mtp_block == "llama":
        return _LlamaBlock(vllm_config, prefix=prefix, config=config)
    layer = {"qwen2": Qwen2DecoderLayer, "qwen3": Qwen3DecoderLayer}[config.mtp_block]
    return layer(
        config, vllm_config.cache_config, get_draft_quant_config(vllm_config), prefix=prefix
    )


class MTPLayer(nn.Module):
    """The projection that joins token and state, then a block."""

    def __init__(self, vllm_config: VllmConfig, config: PretrainedConfig, prefix: str):
        super().__init__()
        hidden, norm_eps = config.hidden_size, config.rms_norm_eps
        self.token_layernorm = RMSNorm(hidden, eps=norm_eps)
        self.hidden_layernorm = RMSNorm(hidden, eps=norm_eps)
        self.input_proj = ReplicatedLinear(
            2 * hidden,
            hidden,
            bias=False,
            quant_config=get_draft_quant_config(vllm_config),
            prefix=f"{prefix}.input_proj",
            return_bias=False,
        )
        self.block = _block(vllm_config, config, prefix)
        self.final_layernorm = RMSNorm(hidden, eps=norm_eps)

    def forward(
        self, embedding: Hidden, hidden: Hidden, positions: Int[Tensor, "tokens"]
    ) -> Hidden:
        both = [self.token_layernorm(embedding), self.hidden_layernorm(hidden)]
        joined = self.input_proj(torch.cat(both, dim=-1))
        hidden, residual = self.block(positions, joined, None)
        normed, _ = self.final_layernorm(hidden, residual)
        return normed


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0, "inputs_embeds": 0}
)
class MTPNetwork(nn.Module):
    """Embeddings and the one layer; the names of its tensors are the checkpoint's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        assert vllm_config.speculative_config is not None
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        # vLLM finds a layer's place in the KV cache by the one number in its name: the draft's
        # comes after the verifier's.
        place = vllm_config.model_config.get_total_num_hidden_layers()
        layer = MTPLayer(vllm_config, config, maybe_prefix(prefix, f"layers.{place}"))
        self.mtp_layers = nn.ModuleList([layer])

    def forward(
        self,
        input_ids: Int[Tensor, "tokens"] | None,
        positions: Int[Tensor, "tokens"],
        hidden_states: Hidden,
        inputs_embeds: Hidden | None = None,
    ) -> Hidden:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        return self.mtp_layers[0](inputs_embeds, hidden_states, positions)


class MTPForCausalLM(nn.Module):
    """Network of vLLM's proposer of method ``mtp``.

    It does not declare embeddings and a head: vLLM then puts the verifier's in.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"mtp_layers.": "model.mtp_layers."},
        orig_to_new_substr={
            f".{part}.": f".block.{part}."
            for part in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        },
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        assert vllm_config.speculative_config is not None
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        self.verifier = vllm_config.model_config.model
        self.verifier_config = vllm_config.model_config.hf_config
        self.verifier_hub = HubOptions(
            revision=vllm_config.model_config.revision or "main",
            token=vllm_config.model_config.hf_token,
            cache_dir=vllm_config.load_config.download_dir,
        )
        self.model = MTPNetwork(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "mtp"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            prefix=maybe_prefix(prefix, "mtp.lm_head"),
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        is_pre_norm = self.config.verifier_state == "pre_norm"
        norm = torch.ones(self.config.hidden_size) if is_pre_norm else None
        self.verifier_norm: Tensor | None
        self.register_buffer("verifier_norm", norm, persistent=False)

    def embed_input_ids(
        self,
        input_ids: Int[Tensor, "tokens"],
        multimodal_embeddings: "MultiModalEmbeddings | None" = None,
        is_multimodal: Tensor | None = None,
    ) -> Hidden:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Int[Tensor, "tokens"] | None,
        positions: Int[Tensor, "tokens"],
        hidden_states: Hidden,
        intermediate_tensors: "IntermediateTensors | None" = None,
        inputs_embeds: Hidden | None = None,
        spec_step_idx: int = 0,
    ) -> Hidden:
        """The state that the head and the next step read.

        vLLM passes states after the verifier's final norm, also to a draft that was trained on
        states before it: divided by the norm's weights, the two differ by their length alone, which
        `hidden_layernorm` removes. The states that the draft passes on must then have these weights
        too.
        """
        if self.verifier_norm is None:
            return self.model(input_ids, positions, hidden_states, inputs_embeds)
        hidden_states = hidden_states / self.verifier_norm
        return self.model(input_ids, positions, hidden_states, inputs_embeds) * self.verifier_norm

    def compute_logits(
        self, hidden_states: Hidden, spec_step_idx: int = 0
    ) -> Float[Tensor, "tokens vocab"] | None:
        if self.verifier_norm is not None:
            hidden_states = hidden_states / self.verifier_norm
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own = ((name, tensor) for name, tensor in weights if name not in VERIFIERS)
        loaded = AutoWeightsLoader(self).load_weights(own, mapper=self.hf_to_vllm_mapper)
        if self.verifier_norm is not None:
            norm = read_final_norm(self.verifier, self.verifier_config, self.verifier_hub)
            if (norm == 0).any():
                raise SpeculatorError(
                    f"{self.verifier}: its final norm has weights of zero; expected none, since "
                    "this MTP speculator was trained on the state before the norm, which cannot be "
                    "restored then. Train it with verifier_state post_norm."
                )
            self.verifier_norm.copy_(norm)
        # vLLM asks which parameters were loaded; these two are the verifier's.
        return loaded | {f"model.{VERIFIERS[0]}", VERIFIERS[1]}
