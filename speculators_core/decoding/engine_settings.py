"""Settings of the inference engine, as publicly documented."""

from pydantic import Field, field_validator

from speculators_core.settings import Settings


class InferenceParameters(Settings):
    """How texts are continued."""

    temperature: float = Field(0.7, ge=0.0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(0.9, gt=0.0, le=1.0)
    """Nucleus sampling: probability mass to sample from."""
    max_new_tokens: int = Field(128, ge=1)
    """Maximum number of new tokens of each text."""
    do_sample: bool = True
    """Sample; greedy decoding if false."""


class SpeculativeDecodingConfig(Settings):
    """Verifier, draft, and how they decode together."""

    draft_model_path: str
    """Draft: a folder or a hub id."""
    main_model_path: str
    """Verifier: a folder or a hub id."""
    max_speculative_tokens: int = Field(5, ge=1)
    """Maximum number of tokens proposed in one step."""
    acceptance_threshold: float = Field(1.0, gt=0.0, le=1.0)
    """Greedy decoding accepts a draft token that the verifier gives at least this share of its best
    token's probability. Below 1 the output may differ from the verifier's."""
    use_vllm: bool = False
    """Decode with vLLM instead of Transformers."""
    deepspeed_config_path: str | None = None
    """DeepSpeed does not run the inference engine; only None is accepted."""

    @field_validator("deepspeed_config_path")
    @classmethod
    def _trains_only(cls, path: str | None) -> str | None:
        if path is not None:
            raise ValueError(
                "the inference engine does not run on DeepSpeed. Use use_vllm with vLLM's "
                "tensor_parallel_size, or train with `run.deepspeed`"
            )
        return path


class GlobalConfig(Settings):
    """Both sections, as one file has them."""

    inference: InferenceParameters = Field(default_factory=InferenceParameters)
    """How texts are continued."""
    speculative: SpeculativeDecodingConfig
    """Verifier, draft, and how they decode together."""
