"""From a speculator's config to vLLM's speculative settings."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from speculators_core.errors import SpeculatorError, UnreadFormatError, first_line
from speculators_core.format import checkpoint
from speculators_core.format.checkpoint import HubOptions, RawConfig, locate_verifier
from speculators_core.format.loading import names_of
from speculators_core.registry import MODELS
from speculators_core.verifier.pair import Pair
from speculators_vllm.plugin.proposers import PROPOSERS

logger = logging.getLogger(__name__)

UNSNIFFED_METHODS = ("eagle", "eagle3", "dflash", "dspark")
SNIFFED_WORDS = ("eagle-", "eagle3", "dflash", "dspark")
"""For any other method vLLM 0.32 looks for these in the draft's path, and believes the path."""
WITHOUT_CHECKPOINT = ("ngram", "ngram_gpu", "suffix", "custom_class")
"""Methods whose ``model`` is not a checkpoint."""
MOST_TOKENS = 128
"""vLLM's own bound, which it looks at when the first draft is verified."""
LONGEST_MESSAGE = 800
"""Characters; a checkpoint may hold anything, and messages quote it."""


@dataclass(frozen=True)
class Source:
    """How vLLM was told to get its files."""

    token: str | bool | None = None
    cache_dir: str | None = None
    tokenizer: str | None = None
    """The verifier's own where None."""
    has_weights: bool = True
    """False with ``--load-format dummy``."""


def complete(
    given: Mapping[str, Any],
    by_flag: Mapping[str, Any],
    verifier: PretrainedConfig,
    verifier_name: str,
    source: Source | None = None,
) -> dict[str, Any]:
    """The user's settings, completed from the speculator's checkpoint.

    ``given`` is ``--speculative-config``, ``by_flag`` the settings that were given as flags.
    vLLM refuses a setting in both, so what a flag gives is not added. A draft that is not in the
    speculators format is left to vLLM.

    Raises:
        SpeculatorError: the speculator is at fault, or was not made for this verifier.
    """
    settings = {key.replace("-", "_"): value for key, value in given.items()}
    try:
        from_checkpoint = _from_checkpoint(
            {**settings, **by_flag}, verifier, verifier_name, source or Source()
        )
    except SpeculatorError as error:
        message = _one_line(str({**settings, **by_flag}["model"]), error)
        raise SpeculatorError(message, cause=error.cause) from error
    except Exception:  # a fault of ours must not stop a run that vLLM can do alone
        logger.warning("speculators-vllm could not read the speculator", exc_info=True)
        return settings
    if from_checkpoint:
        logger.info("speculator: %s", {**from_checkpoint, **settings, **by_flag})
    return {**{k: v for k, v in from_checkpoint.items() if k not in by_flag}, **settings}


def _one_line(name: str, error: SpeculatorError) -> str:
    """What is wrong with the draft of that name, without what a terminal would obey."""
    message = str(error) if name in str(error) else f"{name}: {error}"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    half = LONGEST_MESSAGE // 2
    return shown if len(shown) <= LONGEST_MESSAGE else f"{shown[:half]} ... {shown[-half:]}"


def _from_checkpoint(
    user: Mapping[str, Any], verifier: PretrainedConfig, verifier_name: str, source: Source
) -> dict[str, Any]:
    """vLLM's settings that the checkpoint decides; none where the draft is vLLM's to judge."""
    name = user.get("model")
    if not isinstance(name, str) or not _may_be_a_speculator(name, user.get("method")):
        return {}
    hub = HubOptions(
        revision=user.get("revision") or "main", token=source.token, cache_dir=source.cache_dir
    )
    try:
        config_dict = checkpoint.fetch_config(name, hub)
    except SpeculatorError as error:
        if user.get("method") is None and _is_broken_local(name):
            raise
        logger.info("left the draft to vLLM: %s", error)
        return {}
    if config_dict.get("speculators_config") is None:
        if checkpoint.is_speculator(config_dict):
            raise SpeculatorError(
                f"{name}: {checkpoint.CONFIG} has no speculators_config, without which vLLM does "
                "not know a speculator."
            )
        return {}
    tokens = user.get("num_speculative_tokens")
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise SpeculatorError(f"num_speculative_tokens must be at least 1, found {tokens!r}.")
    check_served(name, config_dict)
    if config_dict["speculators_model_type"] in MODELS.names():
        config_dict = _completed(config_dict, name, verifier, verifier_name, source, hub)
    try:
        settings = vllm_settings(config_dict)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SpeculatorError(
            f"{name}: vLLM cannot read its speculators_config "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    tokens = user.get("num_speculative_tokens", settings["num_speculative_tokens"])
    if isinstance(tokens, int) and tokens > MOST_TOKENS:
        raise SpeculatorError(
            f"{name}: vLLM verifies at most {MOST_TOKENS} speculative_tokens, found {tokens}."
        )
    return settings


def _completed(
    config_dict: RawConfig,
    name: str,
    verifier: PretrainedConfig,
    verifier_name: str,
    source: Source,
    hub: HubOptions,
) -> RawConfig:
    """The config of a draft that fits its verifier, with all of its ``speculators_config``.

    One that this package does not read is vLLM's to judge; a warning states the reason.

    Raises:
        SpeculatorError: the draft is at fault, or was not made for this verifier.
    """
    try:
        pair = Pair.open(
            name,
            verifier_name,
            verifier_config=verifier,
            tokenizer=source.tokenizer,
            has_weights=source.has_weights,
            files=checkpoint.ALL_FILES if source.has_weights else [checkpoint.CONFIG],
            hub=hub,
        )
    except UnreadFormatError as error:
        logger.warning("vLLM serves the draft unchecked. %s", _one_line(name, error))
        return config_dict
    except SpeculatorError:
        raise
    except Exception:  # a fault of ours must not stop a run that vLLM can do alone
        logger.warning("vLLM serves the draft %s unchecked", name, exc_info=True)
        return config_dict
    if pair.ignored_tensors:
        logger.warning(
            "%s has tensors without use, which were ignored: %s",
            name,
            names_of(pair.ignored_tensors),
        )
    completed = pair.speculator.config.speculators_config
    assert completed is not None
    return {**config_dict, "speculators_config": completed.model_dump()}


def check_served(name: str, config_dict: Mapping[str, Any], with_plugin: bool = True) -> None:
    """Raises SpeculatorError unless vLLM can serve such a speculator, from where it lies."""
    # vLLM, which the acceptance of the Transformers engine does without.
    from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES

    from speculators_vllm.plugin.draft_config import DraftConfig, proposer_of  # imports vLLM

    kind = config_dict.get("speculators_model_type")
    ours = PROPOSERS.names() if with_plugin else ()
    served = sorted({*SUPPORTED_SPECULATORS_TYPES, *ours})
    if kind in PROPOSERS.names() and kind not in served:
        raise SpeculatorError(
            f"{name}: vLLM alone serves no {kind} speculator; it serves {', '.join(served)}. "
            "Leave the plug-in on: VLLM_PLUGINS has to name it, or be unset.",
            cause="unsupported by vLLM",
        )
    if kind not in served:
        what = "vLLM has no proposer for" if kind in MODELS.names() else "unknown"
        raise SpeculatorError(
            f"{name}: {what} speculators_model_type {kind!r}; known: {', '.join(served)}.",
            cause="unsupported by vLLM",
        )
    proposer = proposer_of(config_dict)
    if proposer is None:
        return
    try:
        DraftConfig.extract_transformers_pre_trained_config(dict(config_dict))
    except SpeculatorError as error:
        raise error.within(name, "unsupported by vLLM") from error
    except (KeyError, ValueError, TypeError) as error:
        raise SpeculatorError(
            f"{name}: vLLM cannot read its config ({type(error).__name__}: {first_line(error)}).",
            cause="unsupported by vLLM",
        ) from error
    taken = next((word for word in SNIFFED_WORDS if word in str(name).lower()), None)
    if proposer.method not in UNSNIFFED_METHODS and taken is not None:
        raise SpeculatorError(
            f"{name}: the path holds {taken!r}, from which vLLM would take another method than "
            f"{proposer.method}. Rename the folder, or link to it under another name.",
            cause="unsupported by vLLM",
        )


def _may_be_a_speculator(name: str, method: str | None) -> bool:
    """Some methods name something else as their model; other hubs than ours are vLLM's."""
    if method in WITHOUT_CHECKPOINT or "://" in name or os.environ.get("VLLM_USE_MODELSCOPE"):
        return False
    return "/" in name or Path(name).exists()


def _is_broken_local(name: str) -> bool:
    """A path where nothing is, or nothing by which vLLM knows a model."""
    folder = Path(name)
    if not folder.exists():
        return name.startswith((".", "/", "~"))
    files = folder.iterdir() if folder.is_dir() else [folder]
    return not any(path.name == "params.json" or path.suffix == ".gguf" for path in files)


def locate(
    speculator: str,
    verifier: str | None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[str, dict[str, Any]]:
    """Where the verifier of a speculator lies that is served by its own name, and its settings.

    Raises:
        SpeculatorError: the speculator names no verifier; or a revision is asked for, which vLLM
            would look for in the verifier's repository.
    """
    if not verifier:
        raise SpeculatorError(
            f"{speculator} names no verifier. Serve it with vllm serve <verifier> "
            f'--speculative-config \'{{"model": "{speculator}"}}\'.'
        )
    located = locate_verifier(verifier, beside=speculator)
    if revision is not None:
        raise SpeculatorError(
            f"--revision {revision}: vLLM would look for it in the verifier {verifier}. Serve with "
            f"vllm serve {located} --speculative-config "
            f'\'{{"model": "{speculator}", "revision": "{revision}"}}\'.'
        )
    settings = vllm_settings(checkpoint.fetch_config(speculator, HubOptions(token=token)))
    return located, {**settings, "model": speculator}


def vllm_settings(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Method, number of tokens and the like, of the default proposal method.

    vLLM itself reads the first method whatever the default is.
    """
    from speculators_vllm.plugin.draft_config import DraftConfig  # imports vLLM

    inner = dict(config_dict["speculators_config"])
    default = inner.get("default_proposal_method")
    methods = inner.get("proposal_methods") or []
    inner["proposal_methods"] = sorted(methods, key=lambda m: m.get("proposal_type") != default)
    return DraftConfig.extract_vllm_speculative_config(
        config_dict={**config_dict, "speculators_config": inner}
    )
