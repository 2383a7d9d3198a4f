"""Tiny verifiers of many families, by ``model_type``."""

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from speculators_core.verifier.reading import language_model_class

FAMILY = pytest.mark.families
VOCAB_SIZE = 96
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # experts
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # linear attention and state-space layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
}
HYBRID = ["linear_attention", "full_attention"] * 2
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
    "deepstack_visual_indexes": [0],
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": HYBRID},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma4_text": {
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi": {},
    "phi3": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {},
    "gpt_bigcode": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "bloom": {},
    "falcon": {},
    "mpt": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "olmo": {},
    "olmo2": {},
    "olmoe": {},
    "stablelm": {},
    "starcoder2": {},
    "cohere": {},
    "cohere2": {},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 8, "num_key_value_heads": 4},
    "mamba": {},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 1},
    "falcon_mamba": {},
    "falcon_h1": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8},
    "nemotron": {},
    "nemotron_h": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "recurrent_gemma": {},
    "smollm3": {},
    "exaone4": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "minimax": {},
    "persimmon": {},
    "helium": {},
    "arcee": {},
    "llama4_text": {"intermediate_size_mlp": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "laurel_rank": 4,
    },
    "rwkv": {},
    "openai-gpt": {},
    "qwen3_vl": {"text_config": {"rope_parameters": MROPE}, "vision_config": QWEN_VISION},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}, "vision_config": QWEN_VISION},
    "qwen3_5": {"text_config": {"layer_types": HYBRID}, "vision_config": QWEN_VISION},
    "gemma3": {"text_config": {}, "vision_config": VISION, "mm_tokens_per_image": 4},
    "mistral3": {"text_config": {"model_type": "mistral"}, "vision_config": VISION},
    "llava": {"text_config": {"model_type": "llama"}, "vision_config": VISION},
}
"""Keys of each family's config beside `SMALL`."""


def make_config(model_type: str) -> PretrainedConfig:
    keys = FAMILIES[model_type]
    text = keys.get("text_config")
    if text is None:
        return CONFIG_MAPPING[model_type](**_small(model_type) | keys)
    whole = CONFIG_MAPPING[model_type]
    text_type = text.get("model_type") or whole.sub_configs["text_config"].model_type
    sizes = {**_small(text_type), **text, "model_type": text_type}
    return whole(**{**keys, "text_config": sizes}, pad_token_id=None)


def _small(model_type: str) -> dict:
    """The keys of `SMALL` that a family's config knows, under its names."""
    config = CONFIG_MAPPING[model_type]
    known = set(getattr(config, "__dataclass_fields__", {})) | set(config.attribute_map)
    return {key: value for key, value in SMALL.items() if key in known}


def make_verifier(model_type: str) -> PreTrainedModel:
    """Random weights, and norms with gains of their own."""
    config = make_config(model_type)
    torch.manual_seed(0)
    model = language_model_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and name.endswith("weight"):
                weight.uniform_(0.5, 1.5)
    return model
