"""Data of the tests: ``interop`` holds speculators trained by another implementation.

The cases are as recorded, but that of the logits DFlash's has every sixth anchor's alone
([anchors, slots, vocab]) and P-EAGLE's every fourth element's.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from speculators_core.batch import Batch

INTEROP = Path(__file__).parent / "interop"


def interop_acceptance() -> dict[str, Any]:
    """Prompts, the verifier's own outputs and the accepted counts, as recorded from stock vLLM."""
    return json.loads((INTEROP / "acceptance.json").read_text())


def interop_case(name: str) -> tuple[dict[str, Tensor], Batch]:
    """What was recorded of an algorithm, and the packed row that it was recorded on."""
    case = load_file(INTEROP / f"{name}_case.safetensors")
    columns = {f.name: case[f.name][None] for f in dataclasses.fields(Batch) if f.name in case}
    return case, Batch(**columns, last_hidden_states=case["verifier_last_hidden_states"][None])
