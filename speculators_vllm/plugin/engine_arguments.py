"""Wrappers of how vLLM reads an engine's arguments."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from vllm import platforms

from speculators_core.errors import SpeculatorError, first_line
from speculators_vllm import openmp
from speculators_vllm.hidden_states import CONNECTOR_MODULE
from speculators_vllm.plugin import patches
from speculators_vllm.plugin.positions import follow_served_length

if TYPE_CHECKING:
    from pydantic import JsonValue
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

    CreateConfig = Callable[[EngineArgs, ModelConfig, ParallelConfig], SpeculativeConfig | None]
    Overridden = tuple[str, str | None, dict[str, JsonValue] | None]
    """Model, tokenizer and speculative settings."""

BACKENDS = {
    "guidance": "llguidance.torch",
    "lm-format-enforcer": "lmformatenforcer.integrations.vllm",
    "outlines": "outlines_core",
    "xgrammar": "xgrammar",
}
"""Of structured outputs, with the modules that vLLM imports for them."""


def completing_speculative_config(original: "CreateConfig") -> "CreateConfig":
    """Fills the speculative settings in from the speculator's checkpoint.

    vLLM calls this for each engine, with or without speculation, before it starts processes.
    """

    def create_speculative_config(
        self: "EngineArgs",
        target_model_config: "ModelConfig",
        target_parallel_config: "ParallelConfig",
    ) -> "SpeculativeConfig | None":
        openmp.preload_in_children()
        if getattr(self.kv_transfer_config, "kv_connector_module_path", None) == CONNECTOR_MODULE:
            for patch in patches.FOR_SERVER_REQUESTS:
                patch.apply()
        if self.speculative_config is not None or self.spec_model is not None:
            structured = self.structured_outputs_config
            refuse_what_cannot_draft(
                target_model_config.runner_type,
                structured.get("backend", "auto")
                if isinstance(structured, dict)  # as `LLM` leaves it
                else structured.backend,
            )
            refuse_misread_keys(self.kv_cache_dtype, str(target_model_config.dtype))
            # Models and Transformers, which an engine without a speculator does not need.
            from speculators_vllm.plugin.speculative_config import Source, complete

            by_flag = {
                "method": self.spec_method,
                "model": self.spec_model,
                "num_speculative_tokens": self.spec_tokens,
            }
            self.speculative_config = complete(
                self.speculative_config or {},
                {key: value for key, value in by_flag.items() if value is not None},
                target_model_config.hf_config,
                target_model_config.model,
                Source(
                    token=self.hf_token,
                    cache_dir=self.download_dir,
                    tokenizer=target_model_config.tokenizer,
                    has_weights=self.load_format != "dummy",
                ),
            )
        config = original(self, target_model_config, target_parallel_config)
        if config is not None:
            follow_served_length(config, target_model_config.max_model_len)
        return config

    return create_speculative_config


def refuse_what_cannot_draft(runner: str, backend: str) -> None:
    """Raises SpeculatorError for what would stop the engine later, at a request.

    vLLM imports a backend of structured outputs when the first request asks for one, inside its
    engine.
    """
    if runner == "pooling":
        raise SpeculatorError(
            "--runner pooling: nothing is generated, so nothing can be drafted. Leave out "
            "--speculative-config."
        )
    module = BACKENDS.get(backend)
    if module is None:
        return
    try:
        import_module(module)
    except ImportError as error:
        raise SpeculatorError(
            f"--structured-outputs-config: the backend {backend} cannot be imported "
            f"({first_line(error)}), and the first request for it would stop the engine. Choose "
            "another one, such as xgrammar."
        ) from error


def refuse_misread_keys(cached: str, computed: str) -> None:
    """Raises SpeculatorError for keys and values that vLLM's kernels for CPUs take for others.

    With bfloat16 ones of a float32 model, texts without a draft are wrong from the first token.
    """
    is_plain = cached in ("bfloat16", "float16", "float32")
    if platforms.current_platform.is_cpu() and is_plain and cached not in computed:
        raise SpeculatorError(
            f"--kv-cache-dtype {cached}: vLLM on a CPU misreads such keys of a {computed} model. "
            "Leave it out, or serve with the same --dtype."
        )


def locating_verifier(original: Callable[..., "Overridden"]) -> Callable[..., "Overridden"]:
    """Finds the verifier of a speculator that is given as the model."""

    def maybe_override_with_speculators(
        model: str,
        tokenizer: str | None,
        trust_remote_code: bool,
        revision: str | None = None,
        vllm_speculative_config: "dict[str, JsonValue] | None" = None,
        hf_token: bool | str | None = None,
        **kwargs: object,
    ) -> "Overridden":
        verifier, their_tokenizer, speculative_config = original(
            model,
            tokenizer,
            trust_remote_code,
            revision,
            vllm_speculative_config,
            hf_token,
            **kwargs,
        )
        if verifier == model:
            return verifier, their_tokenizer, speculative_config
        from speculators_vllm.plugin.speculative_config import locate  # heavy, as above

        located, settings = locate(model, verifier, revision, hf_token)
        method = {"method": settings["method"]}  # not the user's to choose
        user = vllm_speculative_config or {}
        return located, tokenizer or located, {**settings, **user, **method}

    return maybe_override_with_speculators
