"""The network of another package's algorithm in vLLM."""

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)


class BigramForCausalLM(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.table = nn.Embedding(config.vocab_size, config.rank)
        self.up = nn.Linear(config.rank, config.hidden_size, bias=False)
        self.model = nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        place = vllm_config.model_config.get_total_num_hidden_layers()
        heads = config.num_attention_heads
        self.unused = Attention(  # vLLM 0.32 wants every draft to have a layer in the KV cache
            heads,
            config.head_dim,
            1.0,
            num_kv_heads=config.num_key_value_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"bigram.layers.{place}.attn",
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, is_multimodal=None):
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids, positions, hidden_states, intermediate_tensors=None, inputs_embeds=None
    ):
        return self.up(self.table(input_ids))

    def compute_logits(self, hidden_states, spec_step_idx=0):
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights):
        own = dict(self.named_parameters())
        names = set()
        for name, tensor in weights:
            with torch.no_grad():
                own[name].copy_(tensor)
            names.add(name)
        return names | {"model.embed_tokens.weight", "lm_head.weight"}
