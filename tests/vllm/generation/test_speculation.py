"""The inference engine on a real vLLM."""

import pytest
import torch

from speculators_core import SpeculativeConfig, SpeculativeInferenceEngine
from tests.conftest import make_verifier
from tests.vllm.serving import SMALL, write_tokenizer

pytestmark = pytest.mark.vllm


def test_vllm_writes_what_the_verifier_writes_and_counts_what_it_accepted(tmp_path):
    shape = SMALL | {"initializer_range": 0.08}
    verifier = make_verifier(**shape)
    for name, model in (("main", verifier), ("draft", make_verifier(**shape))):
        model.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, SMALL["vocab_size"])
    config = SpeculativeConfig(
        main_model_path=str(tmp_path / "main"),
        draft_model_path=str(tmp_path / "draft"),
        max_speculative_tokens=3,
        max_new_tokens=16,
        use_vllm=True,
        dtype="float32",
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with SpeculativeInferenceEngine.from_config(config) as engine:
        found = engine.generate(input_ids=ids, max_new_tokens=12)
        text = engine.generate("5 6 7")
    assert torch.equal(found, verifier.generate(ids, max_new_tokens=12, do_sample=False))
    assert len(text.token_ids[0]) == 16
    assert set(text.acceptance[0].accepted) == {3}  # the draft is the verifier itself
