"""Entries in vLLM's tables of networks and configs."""

import functools
import logging

from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils import config

from speculators_vllm.plugin.draft_config import DraftConfig
from speculators_vllm.plugin.proposers import PROPOSERS

logger = logging.getLogger(__name__)


@functools.cache
def register_networks() -> None:
    """Adds the networks of all proposers to vLLM's model registry, by name alone."""
    for name in PROPOSERS.names():
        try:
            networks = PROPOSERS.load(name).networks
        except Exception:  # another package's fault must not stop ours
            logger.warning("speculators-vllm left out the proposer %s", name, exc_info=True)
            continue
        for architecture, path in networks.items():
            ModelRegistry.register_model(architecture, path)


def replace_config_class() -> None:
    """Lets vLLM 0.32 and 0.33 read speculators by `DraftConfig`; their class cannot read MTP."""
    table = getattr(config, "_CONFIG_REGISTRY", None)
    if not isinstance(table, dict) or "speculators" not in table:
        logger.warning("speculators-vllm found no vLLM config class for speculators to replace")
        return
    table["speculators"] = DraftConfig
