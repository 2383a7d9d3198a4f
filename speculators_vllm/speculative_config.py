"""From a speculator's config to vLLM's speculative settings."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from speculators_core import checkpoint
from speculators_core.config import SpeculatorModelConfig
from speculators_core.errors import SpeculatorError
from speculators_core.model import SpeculatorModel
from speculators_core.registry import MODELS
from speculators_core.verifier import check_verifier

logger = logging.getLogger(__name__)


def complete(
    given: Mapping[str, Any],
    by_flag: Mapping[str, Any],
    verifier: PretrainedConfig,
    verifier_name: str,
) -> dict[str, Any]:
    """The user's settings, and for the rest what the speculator's checkpoint says.

    ``given`` is ``--speculative-config``, ``by_flag`` the settings that have a flag of their own.
    vLLM refuses a setting in both, so what a flag gives is not added. A draft that is not in the
    speculators format is left to vLLM.

    Raises:
        SpeculatorError: the speculator is at fault, or was not made for this verifier.
    """
    settings = {key.replace("-", "_"): value for key, value in given.items()}
    user = {**settings, **by_flag}
    name = user.get("model")
    if not isinstance(name, str) or not _may_be_a_speculator(name, user):
        return settings
    folder = checkpoint.fetch(name, weights=False, revision=user.get("revision") or "main")
    config_dict = checkpoint.read_config(folder)
    if config_dict.get("speculators_config") is None:
        return settings
    if config_dict.get("speculators_model_type") in MODELS.names():
        check_speculator(name, user.get("revision"), verifier, verifier_name)
    from_checkpoint = vllm_settings(config_dict)
    tokens = user.get("num_speculative_tokens")
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise SpeculatorError(f"num_speculative_tokens must be at least 1, found {tokens!r}.")
    completed = {**{k: v for k, v in from_checkpoint.items() if k not in user}, **settings}
    logger.info(
        "speculator %s: %s, %s tokens a step",
        name,
        user.get("method", from_checkpoint["method"]),
        user.get("num_speculative_tokens", from_checkpoint["num_speculative_tokens"]),
    )
    return completed


def _may_be_a_speculator(name: str, user: Mapping[str, Any]) -> bool:
    """Methods without a draft checkpoint name something else as their model."""
    if user.get("method") in ("ngram", "suffix", "custom_class"):
        return False
    if "://" in name:
        return False
    return Path(name).is_dir() or not name.startswith((".", "/", "["))


def check_speculator(
    name: str, revision: str | None, verifier: PretrainedConfig, verifier_name: str
) -> None:
    """Reads the whole speculator once, before vLLM loads anything.

    Raises:
        SpeculatorError: config, tensors or verifier are at fault.
    """
    folder = checkpoint.fetch(name, revision=revision or "main")
    config = SpeculatorModelConfig.from_pretrained(folder)
    verifier.name_or_path = verifier_name
    check_verifier(config, verifier)
    SpeculatorModel.check_checkpoint(folder, config)


def vllm_settings(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Method, number of tokens and the like, of the default proposal method.

    vLLM itself reads the first method whatever the default is.
    """
    from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

    inner = dict(config_dict["speculators_config"])
    default = inner.get("default_proposal_method")
    methods = inner.get("proposal_methods") or []
    inner["proposal_methods"] = sorted(methods, key=lambda m: m.get("proposal_type") != default)
    return SpeculatorsConfig.extract_vllm_speculative_config(
        config_dict={**config_dict, "speculators_config": inner}
    )
