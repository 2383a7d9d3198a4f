"""What a verifier's generation config asks for changes no measurement."""

import pytest
from transformers import GenerationConfig

from benchmarks.acceptance.engines import Decoding, Draft
from benchmarks.acceptance.transformers_engine import TransformersRunner
from speculators_core.decoding.generation import SPECIAL_TOKENS
from speculators_core.training.evaluation import decode_prompts
from tests.conftest import make_draft
from tests.vllm.serving import as_prompts

STATED = {
    "max_length": 9,
    "max_new_tokens": 3,
    "min_length": 40,
    "min_new_tokens": 40,
    "early_stopping": True,
    "max_time": 1e-9,
    "stop_strings": ["a"],
    "do_sample": True,
    "num_beams": 2,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"max_cache_len": 4},
    "temperature": 9.0,
    "top_k": 2,
    "top_p": 0.1,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "length_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(4, 80)],
    "renormalize_logits": True,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 6,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 9.0),
    "suppress_tokens": list(range(4, 80)),
    "begin_suppress_tokens": list(range(4, 80)),
    "sequence_bias": [[[token], -99.0] for token in range(4, 80)],
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 50.0, "greenlist_ratio": 0.1},
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": False,
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 7,
    "is_assistant": True,
    "num_assistant_tokens": 1,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 2,
    "max_matching_ngram_size": 1,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 1,
    "target_lookbehind": 1,
    "disable_compile": True,
    "prefill_chunk_size": 2,
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
}
"""Values that matter; options that a later Transformers adds are set to 1."""
OPTIONS = [
    name
    for name in vars(GenerationConfig())
    if not name.startswith("_") and name not in (*SPECIAL_TOKENS, "transformers_version")
]


@pytest.fixture(scope="module")
def draft(verifier):
    return make_draft("eagle3", verifier)


def outputs(draft, verifier):
    """Texts and accepted tokens of the engine of ``acceptance``, and counts of the evaluation."""
    found = []
    for which in (None, Draft("draft", "draft", 3)):
        runner = TransformersRunner(verifier, which, draft, 2)
        prompts = as_prompts([[5, 9, 17], [40]])
        found += runner.run(prompts, Decoding(8, 0.0, 0, ignore_eos=True), lambda: None)
    counts = decode_prompts(draft, [[5, 9, 17], [40]], 8)
    return [(record.output_ids, record.accepted) for record in found], counts


@pytest.fixture(scope="module")
def plain(draft, verifier):
    return outputs(draft, verifier)


@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_changes_a_measurement(draft, verifier, plain, option):
    before = verifier.generation_config
    stated = GenerationConfig(**before.to_dict())
    setattr(stated, option, STATED.get(option, 1))
    verifier.generation_config = stated
    try:
        assert outputs(draft, verifier) == plain
    finally:
        verifier.generation_config = before
