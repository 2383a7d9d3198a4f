"""Speculators for speculative decoding: configs, draft models, training and a reference decoder.

Every public name can be imported from here. Its module is loaded when the name is first used, so
that importing the package takes no time and needs none of its dependencies.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares both lists
    from speculators_core.batch import Batch as Batch
    from speculators_core.data_generation.dataset import GeneratedDataset as GeneratedDataset
    from speculators_core.data_generation.engines.pipeline import (
        InferencePipeline as InferencePipeline,
    )
    from speculators_core.data_generation.engines.transformers import (
        TransformersPipeline as TransformersPipeline,
    )
    from speculators_core.data_generation.queues.mp_queue import MPQueueStore as MPQueueStore
    from speculators_core.data_generation.queues.zmq_store import ZmqStore as ZmqStore
    from speculators_core.data_generation.runs.generate import generate_data as generate_data
    from speculators_core.data_generation.runs.generate import (
        generate_data_process as generate_data_process,
    )
    from speculators_core.data_generation.runs.workers import (
        generate_data_worker as generate_data_worker,
    )
    from speculators_core.data_generation.settings import DataGenConfig as DataGenConfig
    from speculators_core.data_generation.settings import EngineConfig as EngineConfig
    from speculators_core.data_generation.settings import GenerationPlan as GenerationPlan
    from speculators_core.data_generation.settings import SyncConfig as SyncConfig
    from speculators_core.data_generation.stores.disk import DiskStore as DiskStore
    from speculators_core.decoding.engine_settings import GlobalConfig as GlobalConfig
    from speculators_core.decoding.engine_settings import InferenceParameters as InferenceParameters
    from speculators_core.decoding.engine_settings import (
        SpeculativeDecodingConfig as SpeculativeDecodingConfig,
    )
    from speculators_core.decoding.inference import SpeculativeConfig as SpeculativeConfig
    from speculators_core.decoding.inference import (
        SpeculativeInferenceEngine as SpeculativeInferenceEngine,
    )
    from speculators_core.errors import SpeculatorError as SpeculatorError
    from speculators_core.format.config import SpeculatorModelConfig as SpeculatorModelConfig
    from speculators_core.format.config import SpeculatorsConfig as SpeculatorsConfig
    from speculators_core.format.config import VerifierConfig as VerifierConfig
    from speculators_core.format.config import (
        reload_and_populate_configs as reload_and_populate_configs,
    )
    from speculators_core.format.config import (
        reload_and_populate_models as reload_and_populate_models,
    )
    from speculators_core.format.config import reload_schemas as reload_schemas
    from speculators_core.format.proposals import (
        GreedyTokenProposalConfig as GreedyTokenProposalConfig,
    )
    from speculators_core.format.proposals import (
        SamplingTokenProposalConfig as SamplingTokenProposalConfig,
    )
    from speculators_core.format.proposals import TokenProposalConfig as TokenProposalConfig
    from speculators_core.models.dflash import DFlashDraftModel as DFlashDraftModel
    from speculators_core.models.dflash import DFlashSpeculatorConfig as DFlashSpeculatorConfig
    from speculators_core.models.eagle3 import Eagle3DraftModel as Eagle3DraftModel
    from speculators_core.models.eagle3 import Eagle3SpeculatorConfig as Eagle3SpeculatorConfig
    from speculators_core.models.mtp import MTPDraftModel as MTPDraftModel
    from speculators_core.models.mtp import MTPSpeculatorConfig as MTPSpeculatorConfig
    from speculators_core.models.peagle import PEagleDraftModel as PEagleDraftModel
    from speculators_core.models.peagle import PEagleSpeculatorConfig as PEagleSpeculatorConfig
    from speculators_core.models.speculator import SpeculatorModel as SpeculatorModel
    from speculators_core.training.settings import TrainingPlan as TrainingPlan
    from speculators_core.training.train import train as train

_NAMES = {
    "batch": "Batch",
    "data_generation.dataset": "GeneratedDataset",
    "data_generation.engines.pipeline": "InferencePipeline",
    "data_generation.engines.transformers": "TransformersPipeline",
    "data_generation.queues.mp_queue": "MPQueueStore",
    "data_generation.queues.zmq_store": "ZmqStore",
    "data_generation.runs.generate": "generate_data generate_data_process",
    "data_generation.runs.workers": "generate_data_worker",
    "data_generation.settings": "DataGenConfig EngineConfig GenerationPlan SyncConfig",
    "data_generation.stores.disk": "DiskStore",
    "decoding.engine_settings": "GlobalConfig InferenceParameters SpeculativeDecodingConfig",
    "decoding.inference": "SpeculativeConfig SpeculativeInferenceEngine",
    "errors": "SpeculatorError",
    "format.config": (
        "SpeculatorModelConfig SpeculatorsConfig VerifierConfig "
        "reload_and_populate_configs reload_and_populate_models reload_schemas"
    ),
    "format.proposals": (
        "GreedyTokenProposalConfig SamplingTokenProposalConfig TokenProposalConfig"
    ),
    "models.dflash": "DFlashDraftModel DFlashSpeculatorConfig",
    "models.eagle3": "Eagle3DraftModel Eagle3SpeculatorConfig",
    "models.mtp": "MTPDraftModel MTPSpeculatorConfig",
    "models.peagle": "PEagleDraftModel PEagleSpeculatorConfig",
    "models.speculator": "SpeculatorModel",
    "training.settings": "TrainingPlan",
    "training.train": "train",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
