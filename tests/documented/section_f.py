"""Document F: the design card."""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig

from benchmarks.playground import SPECULATORS, VERIFIER
from speculators_core import SpeculatorModel
from tests.documented.rows import proves


@proves("maps speculators_config to the settings of vLLM")
def vllm_settings():
    from speculators_vllm.plugin.speculative_config import complete

    verifier = AutoConfig.from_pretrained(VERIFIER)
    for name, folder in SPECULATORS.items():
        settings = complete({"model": str(folder)}, {}, verifier, str(VERIFIER))
        draft = SpeculatorModel.from_pretrained(folder, verifier_attachment_mode="detached")
        assert settings["num_speculative_tokens"] == draft.config.proposal.speculative_tokens
        assert settings["method"] == {"peagle": "eagle3"}.get(name, name)


@proves("accelerated serving on GPUs")
def where_there_is_one():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draft = SpeculatorModel.from_pretrained(SPECULATORS["eagle3"], device_map="auto")
    assert draft.device.type == draft.verifier.device.type == device
    ids = torch.tensor([[5, 6, 7]], device=device)
    assert draft.generate(ids, max_new_tokens=4).device.type == device


@proves("fastapi")
def servers():
    vllm = find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    entrypoints = Path(vllm.origin).parent / "entrypoints"
    assert any("from fastapi import" in file.read_text() for file in entrypoints.rglob("*.py"))
