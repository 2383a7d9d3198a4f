"""vLLM's engine arguments and request parameters that the sweep goes through."""

from dataclasses import dataclass, field
from typing import Any

GRAMMAR = 'root ::= "def f(" [a-z]+ "):" "\\n    return " [a-z0-9 +]+ "\\n"'
LARK = 'start: "def f(" /[a-z]+/ "):" "\\n    return " /[a-z0-9 +]+/ "\\n"'
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
REGEX = "(def|class) [a-z]{3,12}:[ ]?[a-z0-9 ]{4,24}"
BLOCKS = 64


@dataclass(frozen=True)
class Flag:
    """One engine, and what each request asks of it."""

    arguments: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[dict[str, Any], ...] = ({},)
    """Of the requests, in turn."""
    adapters: tuple[int | None, ...] = (None,)
    """LoRA of the requests, in turn."""
    by_embeddings: tuple[bool, ...] = (False,)
    """Whether a request gives its prompt as embeddings, in turn."""
    is_server: bool = False
    """`AsyncLLM`, the engine of ``vllm serve``, in processes of its own."""
    environment: dict[str, str] = field(default_factory=dict)


def structured(backend: str, **constraint: Any) -> Flag:
    return Flag(
        arguments={"structured_outputs_config": {"backend": backend}},
        parameters=({"structured_outputs": constraint, "ignore_eos": False}, {}),
    )


def reasoning(start: str, end: str, *budgets: int | None) -> Flag:
    return Flag(
        arguments={"reasoning_config": {"reasoning_start_str": start, "reasoning_end_str": end}},
        parameters=tuple({"thinking_token_budget": budget} for budget in budgets),
    )


OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 10_000_000, "block_size": 32},
}
LORA = {"enable_lora": True, "max_lora_rank": 8}
FLAGS = {
    "none": Flag(),
    "LoRA": Flag(LORA, adapters=(1,)),
    "LoRA of some requests": Flag({**LORA, "max_loras": 2}, adapters=(1, None, 2)),
    "LoRA with one slot": Flag({**LORA, "max_loras": 1}, adapters=(1, 2, None)),
    "LoRA of a server": Flag({**LORA, "max_loras": 2}, adapters=(1, None, 2), is_server=True),
    "prompt embeddings": Flag({"enable_prompt_embeds": True}, by_embeddings=(True,)),
    "prompt embeddings of some": Flag({"enable_prompt_embeds": True}, by_embeddings=(True, False)),
    "prompt embeddings unused": Flag({"enable_prompt_embeds": True}),
    "prompt embeddings in chunks": Flag(
        {"enable_prompt_embeds": True, "max_num_batched_tokens": 32}, by_embeddings=(True, False)
    ),
    "prompt embeddings and penalties": Flag(
        {"enable_prompt_embeds": True},
        parameters=({"repetition_penalty": 1.3},),
        by_embeddings=(True,),
    ),
    "xgrammar, regex": structured("xgrammar", regex=REGEX),
    "xgrammar, JSON": structured("xgrammar", json=SCHEMA),
    "xgrammar, grammar": structured("xgrammar", grammar=GRAMMAR),
    "guidance, regex": structured("guidance", regex=REGEX),
    "guidance, JSON": structured("guidance", json=SCHEMA),
    "guidance, grammar": structured("guidance", grammar=LARK),
    "outlines, regex": structured("outlines", regex=REGEX),
    "outlines, JSON": structured("outlines", json=SCHEMA),
    "lm-format-enforcer, regex": structured("lm-format-enforcer", regex=REGEX),
    "lm-format-enforcer, JSON": structured("lm-format-enforcer", json=SCHEMA),
    "auto, choice": structured("auto", choice=["yes", "no", "perhaps"]),
    "pooling": Flag({"runner": "pooling"}),
    "fp8 keys": Flag({"kv_cache_dtype": "fp8"}),
    "fp8_e5m2 keys": Flag({"kv_cache_dtype": "fp8_e5m2"}),
    "bfloat16 keys": Flag({"kv_cache_dtype": "bfloat16"}),
    "prefix caching": Flag({"enable_prefix_caching": True}),
    "no prefix caching": Flag({"enable_prefix_caching": False}),
    "small chunks": Flag({"enable_chunked_prefill": True, "max_num_batched_tokens": 32}),
    "no chunks": Flag({"enable_chunked_prefill": False, "max_num_batched_tokens": 512}),
    "async scheduling": Flag({"async_scheduling": True}),
    "no async scheduling": Flag({"async_scheduling": False}),
    "async scheduling of a server": Flag({"async_scheduling": True}, is_server=True),
    "tensor parallel": Flag({"tensor_parallel_size": 2}, is_server=True),
    "data parallel": Flag({"data_parallel_size": 2}, is_server=True),
    "pipeline parallel": Flag({"pipeline_parallel_size": 2}, is_server=True),
    "penalties": Flag(
        parameters=(
            {"repetition_penalty": 1.2},
            {"frequency_penalty": 0.5},
            {"presence_penalty": 1.0},
            {},
        )
    ),
    "bad words": Flag(parameters=({"bad_words": ["self", "return"]}, {})),
    "logit bias": Flag(parameters=({"logit_bias": {320: 5.0, 326: -5.0}}, {})),
    "minimum length": Flag(parameters=({"min_tokens": 20, "ignore_eos": False}, {})),
    "allowed tokens": Flag(parameters=({"allowed_token_ids": list(range(5, 400))}, {})),
    "stop words": Flag(parameters=({"stop": ["return"], "ignore_eos": False}, {})),
    "logprobs": Flag(parameters=({"logprobs": 3}, {"prompt_logprobs": 2}, {})),
    "processed logprobs": Flag(
        {"logprobs_mode": "processed_logprobs"}, parameters=({"logprobs": 3}, {})
    ),
    "thinking in prompts": reasoning("(", ")", 5, 12, 0, 30, None),
    "thinking, long end": reasoning("(", "</think>", 3, 8, 17, None),
    "thinking, long start": reasoning("):", "return", 2, 6, 9),
    "thinking, penalties": Flag(
        {"reasoning_config": {"reasoning_start_str": "(", "reasoning_end_str": "</think>"}},
        parameters=({"thinking_token_budget": 6, "repetition_penalty": 1.2}, {}),
    ),
    "few blocks": Flag({"num_gpu_blocks_override": 10, "max_model_len": 256}),
    "priority": Flag({"scheduling_policy": "priority"}),
    "sleep mode": Flag({"enable_sleep_mode": True}),
    "no tokenizer": Flag({"skip_tokenizer_init": True}),
    "quantized by vLLM": Flag({"quantization": "fp8"}),
    "dummy weights": Flag({"load_format": "dummy"}),
    "Transformers backend": Flag({"model_impl": "transformers"}),
    "blocks of 32": Flag({"block_size": 32}),
    "compiled": Flag({"enforce_eager": False}),
    "ends inside a draft": Flag(
        parameters=({"max_tokens": 1}, {"max_tokens": 2}, {"max_tokens": 3})
    ),
    "up to the end of the context": Flag(
        {"max_model_len": 128}, parameters=({"max_tokens": None}, {})
    ),
    "one request at a time": Flag({"max_num_seqs": 1}),
    "offloaded weights": Flag({"cpu_offload_gb": 1}),
    "partial prefills": Flag({"long_prefill_token_threshold": 16, "max_num_batched_tokens": 64}),
    "dynamic K": Flag(
        {"speculative_config": {"num_speculative_tokens_per_batch_size": [[1, 2, 3], [3, 64, 1]]}}
    ),
    "one token": Flag({"speculative_config": {"num_speculative_tokens": 1}}),
    "many tokens": Flag({"speculative_config": {"num_speculative_tokens": 12}}),
    "unpadded drafts": Flag({"speculative_config": {"disable_padded_drafter_batch": True}}),
    "sampled drafts": Flag({"speculative_config": {"draft_sample_method": "probabilistic"}}),
    "tensor parallel draft": Flag({"speculative_config": {"draft_tensor_parallel_size": 1}}),
    "KV events": Flag({"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}}),
    "offloaded keys": Flag(
        {
            "kv_transfer_config": {
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"cpu_bytes_to_use": 10000000, "block_size": 32},
            }
        }
    ),
    "statistics": Flag({"disable_log_stats": False, "kv_cache_metrics": True}),
    "watermark of blocks": Flag({"watermark": 0.1}),
    "processor of logits": Flag({"logits_processors": ["tests.vllm.flags.processors:Shifted"]}),
    "return sampling mask": Flag({"return_sampling_mask": True}),
    "trace replay": Flag({"enable_trace_replay": True}),
    "compute of log-probabilities of tokens": Flag(parameters=({"logprob_token_ids": [5, 9]}, {})),
    "shared storage of prefixes": Flag({"prefix_cache_retention_interval": 64}),
}
DECISIVE = ("none", "LoRA of some requests", "prompt embeddings of some", "thinking, long end")
"""Run in `make test` with one algorithm; all of them by `make test-flags`."""
REFUSED: dict[tuple[str, str | None], str] = {
    ("pooling", None): "nothing is generated",
    ("logit bias", None): "not yet supported with speculative decoding",
    ("processor of logits", None): "not supported when speculative decoding",
    ("bfloat16 keys", None): "misreads such keys",
    ("lm-format-enforcer, regex", None): "cannot be imported",
    ("lm-format-enforcer, JSON", None): "cannot be imported",
}
"""Words of the refusal by flag and algorithm; of any algorithm where None."""
