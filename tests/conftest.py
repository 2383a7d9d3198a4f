"""Shapes are checked while tests run, and tiny models are shared between them."""

import os
import signal

from speculators_vllm import openmp

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts what runs in the background; processes of tests would ignore Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several that share the cores
    os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
openmp.preload()
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

from jaxtyping import install_import_hook  # noqa: E402  # after the OpenMP library

from tests.type_check import check  # noqa: E402  # the hook expects the module to be loaded

CHECKED = """
batch format.vocabulary
verifier.head verifier.taps verifier.proof verifier.fit verifier.reading verifier.attachment
decoding.acceptance decoding.drafter decoding.row_cache decoding.generation decoding.sequences
decoding.rules decoding.independent
models.parts.attention models.parts.unroll models.parts.layers models.parts.losses
models.parts.masks
diagnosis.replay diagnosis.rollout diagnosis.suspects
training.evaluation training.metrics training.trainer
data_generation.examples data_generation.packing data_generation.dataset
data_generation.engines.pipeline data_generation.engines.transformers
data_generation.queues.shared_memory data_generation.queues.zmq_store
data_generation.queues.mp_queue data_generation.queues.ends data_generation.queues.frames
"""
# Not hidden_states.files: what it reads becomes a record before `HiddenStates.faults` judges it.
CHECKED_IN_VLLM = "hidden_states.stream hidden_states.courier"
install_import_hook(
    [
        *(f"speculators_core.{module}" for module in CHECKED.split()),
        *(f"speculators_vllm.{module}" for module in CHECKED_IN_VLLM.split()),
    ],
    "tests.type_check.check",
)

import inspect  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from jaxtyping import jaxtyped  # noqa: E402
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from speculators_core.batch import Batch  # noqa: E402
from speculators_core.data_generation.examples import GeneratedExample  # noqa: E402
from speculators_core.data_generation.packing import RowLayout  # noqa: E402
from speculators_core.models.dflash import DFlashDraftModel  # noqa: E402
from speculators_core.models.eagle3 import Eagle3DraftModel  # noqa: E402
from speculators_core.models.eagle_stack import EagleStackModel  # noqa: E402
from speculators_core.models.feature_draft import FeatureDraftModel  # noqa: E402
from speculators_core.models.mtp import MTPDraftModel  # noqa: E402
from speculators_core.models.peagle import PEagleDraftModel  # noqa: E402
from speculators_core.models.speculator import SpeculatorModel  # noqa: E402
from speculators_core.verifier.taps import LayerTaps  # noqa: E402

# The hook would check the configs of these files too, whose values are pydantic's to judge.
DRAFTS = {
    "eagle3": Eagle3DraftModel,
    "peagle": PEagleDraftModel,
    "dflash": DFlashDraftModel,
    "mtp": MTPDraftModel,
}
for draft in (*DRAFTS.values(), SpeculatorModel, FeatureDraftModel, EagleStackModel):
    for name, member in list(vars(draft).items()):
        if hasattr(member, "of_batch"):  # a forward that takes tensors, too
            member.of_batch = jaxtyped(member.of_batch, typechecker=check)
        elif inspect.isfunction(member):
            setattr(draft, name, jaxtyped(member, typechecker=check))

AUX_LAYER_IDS = (1, 2, 3)
VOCAB_SIZE = 96


def make_verifier(**overrides) -> Qwen3ForCausalLM:
    """Random weights whose greedy texts vary; ``overrides`` are keys of its config."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.4,
        "eos_token_id": None,
    }
    return Qwen3ForCausalLM(Qwen3Config(**shape | overrides)).eval()


SMALL_RECIPES: dict[str, dict] = {
    "eagle3": {"aux_layer_ids": AUX_LAYER_IDS},
    "peagle": {"aux_layer_ids": AUX_LAYER_IDS, "mask_token_id": 2, "speculative_tokens": 4},
    "dflash": {
        "aux_layer_ids": AUX_LAYER_IDS,
        "mask_token_id": 2,
        "block_size": 5,
        "num_layers": 2,
    },
    "mtp": {},
}


def make_draft(name: str, verifier: PreTrainedModel, **kwargs) -> SpeculatorModel:
    """A small draft of random weights with its verifier attached in full."""
    torch.manual_seed(1)
    recipe = {**SMALL_RECIPES[name], **kwargs}
    return DRAFTS[name].from_training_args(verifier.config, verifier=verifier, **recipe)


def make_eagle3(verifier: PreTrainedModel, **kwargs) -> Eagle3DraftModel:
    return make_draft("eagle3", verifier, **kwargs)


def pack_texts(verifier: PreTrainedModel, texts, row_length=None, layer_ids=AUX_LAYER_IDS) -> Batch:
    """Texts of ``input_ids`` and, where not all are trained, ``loss_mask``, end to end in a row.

    The verifier sees each alone. Without ``row_length`` the row is as long as they are.
    """
    examples, taps_ids = [], [*layer_ids, verifier.config.num_hidden_layers]
    for number, text in enumerate(texts):
        ids = torch.as_tensor(text["input_ids"])
        with torch.no_grad(), LayerTaps(verifier, taps_ids) as taps:
            verifier.get_decoder()(input_ids=ids[None].to(verifier.device), use_cache=False)
        states = taps.states(taps_ids)[0].unflatten(-1, (len(taps_ids), -1))
        mask = torch.tensor(text.get("loss_mask", [1] * len(ids))).bool()
        examples.append(GeneratedExample(str(number), ids, mask, 1, states.cpu()))
    return RowLayout(row_length, tuple(range(len(layer_ids))), len(layer_ids)).pack(examples)


def make_batch(
    verifier: PreTrainedModel,
    lengths=(9, 6),
    row_length: int = 18,
    num_tokens: int = 93,
    layer_ids=AUX_LAYER_IDS,
) -> Batch:
    """Random documents, the first two tokens of each without loss, as the verifier sees them."""
    generator = torch.Generator().manual_seed(2)
    documents = [
        {
            "input_ids": torch.randint(3, 3 + num_tokens, (n,), generator=generator).tolist(),
            "loss_mask": [0, 0] + [1] * (n - 2),
        }
        for n in lengths
    ]
    return pack_texts(verifier, documents, row_length, layer_ids)


@pytest.fixture(scope="session")
def verifier() -> Qwen3ForCausalLM:
    return make_verifier()


@pytest.fixture(scope="session")
def verifier_folder(verifier, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "verifier"
    verifier.save_pretrained(folder)
    return folder


@pytest.fixture
def eagle3_folder(verifier, verifier_folder, tmp_path) -> Path:
    folder = tmp_path / "eagle3"
    model = make_eagle3(verifier, name_or_path=str(verifier_folder))
    model.save_pretrained(folder)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What was printed about odd names can be sent between processes."""
    report = yield
    report.sections = [
        (title, text.encode(errors="replace").decode()) for title, text in report.sections
    ]
    return report
