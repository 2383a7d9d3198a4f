"""Rotary keys: a served draft rotates as its network did in training, or the reader says so."""

import random
import re

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig
from speculators_vllm.plugin.draft_config import DraftConfig
from tests.vllm.plugin.test_draft_config import config_of

HEAD_DIM, TRAINED = 8, 64
SCALED = {"factor": 4.0, "original_max_position_embeddings": TRAINED}
KINDS: dict[str, dict] = {
    "default": {},
    "mrope": {"mrope_section": [2, 1, 1]},
    "linear": {"factor": 4.0},
    "llama3": {**SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": SCALED,
}
FURTHER: dict[str, list] = {
    "partial_rotary_factor": [0.25, 0.5, 1.0],
    "mrope_section": [[2, 1, 1]],
    "mrope_interleaved": [True, False],
    "xdrope_section": [[2, 1, 1]],
    "rope_dim": [4],
    "use_fope": [True],
    "type": ["default"],
    "alpha": [1000.0],
    "mscale": [1.0],
    "mscale_all_dim": [0.7, 1.0],
    "attention_factor": [1.3],
    "beta_fast": [16.0],
    "truncate": [False],
}
BESIDE: dict[str, list] = {
    "partial_rotary_factor": [0.25],
    "rotary_pct": [0.25],
    "rotary_emb_fraction": [0.5],
    "rotary_dim": [4],
}
"""Keys that a reader may take for the rope, in ``rope_parameters`` and beside it."""


def some_of(keys, generator):
    chosen = generator.sample(sorted(keys), generator.randint(0, 3))
    return {key: generator.choice(keys[key]) for key in chosen}


def rope_of(seed):
    generator = random.Random(seed)
    kind = generator.choice(sorted(KINDS))
    rope = {"rope_type": kind, "rope_theta": generator.choice([1e4, 5e6]), **KINDS[kind]}
    return {**rope, **some_of(FURTHER, generator)}, some_of(BESIDE, generator)


@pytest.fixture(scope="module", autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.parametrize("name", ["eagle3", "dflash", "mtp"])
@pytest.mark.parametrize("seed", range(25))
def test_served_draft_rotates_as_the_trained_one(seed, name):
    rope, beside = rope_of(seed)
    keys = {"rope_parameters": rope, "head_dim": HEAD_DIM, **beside}
    raw = config_of(name, layer={**keys, "model_type": "llama"})
    layer = SpeculatorModelConfig.from_dict(raw).transformer_layer_config
    served = DraftConfig.extract_transformers_pre_trained_config(raw)
    assert served["rope_parameters"] == layer.rope_parameters
    assert not BESIDE.keys() & {key for key, value in served.items() if value is not None}
    trained = LlamaRotaryEmbedding(LlamaConfig(**layer.to_diff_dict()))
    positions = torch.arange(TRAINED // 2)
    cos, sin = (part[0] for part in trained(torch.zeros(1), positions[None]))
    assert cos.shape[-1] == HEAD_DIM  # the whole head
    cache = get_rope(
        HEAD_DIM, 4 * TRAINED, rope_parameters=served["rope_parameters"], dtype=torch.float32
    ).cos_sin_cache[: len(positions)]
    half = HEAD_DIM // 2
    assert torch.allclose(cache, torch.cat([cos[:, :half], sin[:, :half]], dim=-1), atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"mrope_section": [2, 1, 1]}, r"mrope_section \[2, 1, 1\]"),
        ({"rope_dim": 4}, "rope_dim 4"),
    ],
)
def test_keys_that_are_left_out_are_said(keys, said, caplog):
    raw = config_of("eagle3", layer={"rope_parameters": {"rope_theta": 1e4, **keys}})
    SpeculatorModelConfig.from_dict(raw)
    assert any(re.search(said, r.getMessage()) for r in caplog.records)


def test_scaling_that_vllm_computes_otherwise_is_refused():
    rope = {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(SpeculatorError, match="factor"):
        DraftConfig.extract_transformers_pre_trained_config(
            config_of("eagle3", layer={"rope_parameters": rope})
        )
