"""Checkpoints that releases of the public package wrote, served: `make test-compat`."""

import pytest

from benchmarks.acceptance.engines import Decoding
from benchmarks.acceptance.transformers_engine import TransformersEngine
from benchmarks.acceptance.vllm_engine import VLLMEngine
from tests.data import RELEASES
from tests.vllm.serving import EAGER, as_prompts, run

OLDEST = {}
NEWEST = {}
for folder in sorted(file.parent for file in RELEASES.glob("[0-9]*/*/config.json")):
    OLDEST.setdefault(folder.name, folder)
    NEWEST[folder.name] = folder
NOT_SERVED = {
    "dflash-sample_from_anchor": "vLLM 0.32 drafts from masks alone",
    "dflash-sliding_non_causal": "vLLM 0.32 has mixed layers on its V2 runner alone",
}
SERVED = sorted(
    {*OLDEST.values(), *NEWEST.values()}
    - {NEWEST[n] for n in NOT_SERVED}
    - {OLDEST[n] for n in NOT_SERVED}
)
PROMPTS = as_prompts([[5, 9, 17], [40], list(range(8, 60)), [33, 12, 50, 7, 21]])


@pytest.mark.compat
@pytest.mark.vllm
@pytest.mark.parametrize("folder", SERVED, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_each_is_served_as_it_is_decoded(folder):
    arguments = (str(RELEASES / "verifier"), "float32", 1)
    decoding = Decoding(40, 0.0, 0, ignore_eos=True)
    reference = run(TransformersEngine(*arguments), folder, 3, PROMPTS, decoding)
    served = run(VLLMEngine(*arguments, dict(EAGER)), folder, 3, PROMPTS, decoding)
    for ours, theirs in zip(served, reference, strict=True):
        assert ours.output_ids == theirs.output_ids
        assert ours.accepted == theirs.accepted
