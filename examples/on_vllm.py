"""A trained speculator as the draft, decoded by vLLM."""

from benchmarks.playground import CHECKPOINTS
from speculators_core import SpeculativeConfig, SpeculativeInferenceEngine

config = SpeculativeConfig(
    main_model_path=str(CHECKPOINTS / "verifier"),
    draft_model_path=str(CHECKPOINTS / "eagle3"),
    max_speculative_tokens=3,
    max_new_tokens=32,
    use_vllm=True,
)
with SpeculativeInferenceEngine.from_config(config) as engine:
    result = engine.generate(["import os\n\n\ndef "])
print(result.texts[0], result.acceptance[0].acceptance_length)
