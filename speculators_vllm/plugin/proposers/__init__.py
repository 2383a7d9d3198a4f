"""How vLLM serves speculators: one file per algorithm.

Other packages name theirs in the entry-point group ``speculators_vllm.proposers``, under their
``speculators_model_type``. These are read in every process of vLLM: keep torch and vLLM out of the
module that holds a `Proposer`, and the network in another, which it names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from speculators_core.registry import Registry

Configure = Callable[[Mapping[str, JsonValue], dict[str, JsonValue]], None]


@dataclass(frozen=True)
class Proposer:
    """How vLLM runs the speculators of one algorithm."""

    method: str
    """vLLM's name of the way in which such a draft is run: ``eagle3``, ``dflash``, ``mtp``."""
    configure: Configure
    """Completes vLLM's config of the draft from the speculator's config.

    Called with ``config.json`` as a dict and a copy of its ``transformer_layer_config``, which it
    changes. Raises SpeculatorError where vLLM cannot serve such a draft.
    """
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    """Further speculative settings that the algorithm needs."""
    networks: Mapping[str, str] = field(default_factory=dict)
    """Classes for vLLM's model registry: architecture to ``module:Class``."""


PROPOSERS = Registry(
    "proposer",
    "speculators_vllm.proposers",
    {
        "eagle3": "speculators_vllm.plugin.proposers.eagle3:PROPOSER",
        "peagle": "speculators_vllm.plugin.proposers.peagle:PROPOSER",
        "dflash": "speculators_vllm.plugin.proposers.dflash:PROPOSER",
        "mtp": "speculators_vllm.plugin.proposers.mtp:PROPOSER",
    },
)


def update_as_vllm(
    kind: str, speculator: Mapping[str, JsonValue], draft: dict[str, JsonValue]
) -> None:
    """Completes the config of a draft as vLLM does for ``speculators_model_type`` ``kind``."""
    # Not at start-up: the list of proposers is read in every process.
    from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES

    SUPPORTED_SPECULATORS_TYPES[kind](config_dict=dict(speculator), pre_trained_config=draft)
