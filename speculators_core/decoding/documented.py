"""Arguments of `generate` that speculative decoding ignores."""

from collections.abc import Mapping

from transformers import GenerationConfig

from speculators_core.errors import SpeculatorError


def check_unused(
    synced_gpus: bool | None, use_model_defaults: bool | None, custom_generate: object
) -> None:
    """Checks arguments that have one value here.

    Raises:
        SpeculatorError: another value was asked for.
    """
    if synced_gpus:
        raise SpeculatorError(
            "synced_gpus=True is for models that several processes hold together; a speculator and "
            "its verifier are in one process. Leave it out, or serve with vLLM."
        )
    if use_model_defaults is False:
        raise SpeculatorError(
            "use_model_defaults=False: options that you leave open are the verifier's. State them "
            "in generation_config instead."
        )
    if custom_generate is not None:
        raise SpeculatorError(
            "custom_generate replaces the loop that drafts and verifies. Call "
            "speculator.verifier.generate(custom_generate=...) to decode without the draft."
        )


def has_guidance(config: GenerationConfig | None, arguments: Mapping[str, object]) -> bool:
    """Whether the output is steered away from a second text, which the verifier reads alone."""
    stated = (arguments.get("guidance_scale"), getattr(config, "guidance_scale", None))
    return next((scale for scale in stated if scale is not None), 1) != 1
