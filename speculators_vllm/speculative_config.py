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

WITHOUT_CHECKPOINT = ("ngram", "ngram_gpu", "suffix", "custom_class")
"""Methods whose ``model`` is no checkpoint."""


def complete(
    given: Mapping[str, Any],
    by_flag: Mapping[str, Any],
    verifier: PretrainedConfig,
    verifier_name: str,
    token: str | bool | None = None,
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
    name, revision = user.get("model"), user.get("revision") or "main"
    config_dict = _read_config(user, revision, token) if isinstance(name, str) else {}
    if config_dict.get("speculators_config") is None:
        return settings
    tokens = user.get("num_speculative_tokens")
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise SpeculatorError(f"num_speculative_tokens must be at least 1, found {tokens!r}.")
    if config_dict.get("speculators_model_type") in MODELS.names():
        check_speculator(
            checkpoint.fetch(name, revision=revision, token=token), verifier, verifier_name
        )
    from_checkpoint = vllm_settings(config_dict)
    logger.info("speculator %s: %s", name, {**from_checkpoint, **user})
    return {**{k: v for k, v in from_checkpoint.items() if k not in user}, **settings}


def _read_config(
    user: Mapping[str, Any], revision: str, token: str | bool | None
) -> dict[str, Any]:
    """The draft's ``config.json``; empty where it is for vLLM alone to judge.

    A method of the user's own may take drafts in forms that have no such file, and what is not on
    this machine vLLM may fetch from elsewhere than the hub.
    """
    name, method = user["model"], user.get("method")
    if "://" in name or method in WITHOUT_CHECKPOINT:
        return {}
    try:
        folder = checkpoint.fetch(name, weights=False, revision=revision, token=token)
        return checkpoint.read_config(folder)
    except SpeculatorError:
        is_local = name.startswith((".", "/", "~")) or Path(name).exists()
        if method is None and is_local:
            raise
        return {}


def check_speculator(folder: Path, verifier: PretrainedConfig, verifier_name: str) -> None:
    """Reads the whole speculator once, before vLLM loads anything.

    Raises:
        SpeculatorError: config, tensors or verifier are at fault.
    """
    config = SpeculatorModelConfig.from_pretrained(folder)
    check_verifier(config, verifier, verifier_name)
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
