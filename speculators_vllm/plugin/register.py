"""Entry point that vLLM calls in every process."""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Prepares vLLM for speculators; a second call does nothing.

    An error here is logged and not raised: the plug-in must not stop a run without a speculator.
    """
    try:
        from speculators_vllm.plugin import patches  # here, so that its own errors are caught too

        patches.apply()
    except Exception:
        logger.warning("speculators-vllm is not active in this process", exc_info=True)
