"""Settings of the inference engine in one file."""

from pathlib import Path

from benchmarks.playground import VERIFIER
from speculators_core import (
    GlobalConfig,
    InferenceParameters,
    SpeculativeDecodingConfig,
    SpeculativeInferenceEngine,
)

config = GlobalConfig(
    inference=InferenceParameters(max_new_tokens=16, do_sample=False),
    speculative=SpeculativeDecodingConfig(
        main_model_path=str(VERIFIER), draft_model_path=str(VERIFIER)
    ),
)
Path("config.json").write_text(config.model_dump_json(indent=2))
config = GlobalConfig.model_validate_json(Path("config.json").read_text())

result = SpeculativeInferenceEngine.from_config(config).generate("import os\n\n\ndef ")
print(result.texts[0], result.acceptance[0].acceptance_length)
