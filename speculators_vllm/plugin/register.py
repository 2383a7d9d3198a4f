"""What vLLM calls in each of its processes; the entry point of `vllm.general_plugins`."""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Prepares vLLM for speculators; a second call does nothing.

    Whatever goes wrong here is logged and left: a run without a speculator must not suffer.
    """
    try:
        from speculators_vllm import openmp
        from speculators_vllm.plugin import patches

        openmp.preload_in_children()
        patches.apply()
    except Exception:
        logger.warning("speculators-vllm is not active in this process", exc_info=True)
