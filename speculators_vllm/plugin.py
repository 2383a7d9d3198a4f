"""What vLLM calls in each of its processes; the entry point of `vllm.general_plugins`."""

import logging

logger = logging.getLogger(__name__)

TESTED = ((0, 32), (0, 33))
"""First and last minor version of vLLM that this was made for."""


def register() -> None:
    """Prepares vLLM for speculators; a second call does nothing.

    Whatever goes wrong here is logged and left: a run without a speculator must not suffer.
    """
    try:
        from speculators_vllm import openmp, patches

        warn_of_untested_version()
        openmp.preload_in_children()
        patches.apply()
    except Exception:
        logger.warning("speculators-vllm is not active in this process", exc_info=True)


def warn_of_untested_version() -> None:
    """One warning where vLLM is older or newer than what was tested."""
    from vllm.version import __version_tuple__

    found = tuple(__version_tuple__[:2])
    if not TESTED[0] <= found <= TESTED[1]:
        first, last = ("{}.{}".format(*version) for version in TESTED)
        logger.warning(
            "speculators-vllm was tested with vLLM %s to %s; found %s.%s", first, last, *found
        )
