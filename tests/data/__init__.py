"""Data of the tests: what another implementation computed with its speculators.

The speculators themselves are `benchmarks.training.peers`. The cases are as recorded, except that
DFlash's has the logits of every sixth anchor only ([anchors, slots, vocab]) and P-EAGLE's those of
every fourth element.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.training import PEERS
from speculators_core.batch import Batch

INTEROP = PEERS
OTHER_PACKAGE = Path(__file__).parent / "other_package"
DOCUMENTED_API = Path(__file__).parent / "documented_api.yaml"
RELEASES = Path(__file__).parent / "releases"
CASES = Path(__file__).parent / "interop"


def interop_acceptance() -> dict[str, Any]:
    """Prompts, the verifier's own outputs and the accepted counts, as recorded from stock vLLM."""
    return json.loads((INTEROP / "acceptance.json").read_text())


def interop_case(name: str) -> tuple[dict[str, Tensor], Batch]:
    """What was recorded of an algorithm, and the packed row that it was recorded on."""
    case = load_file(CASES / f"{name}_case.safetensors")
    columns = {f.name: case[f.name][None] for f in dataclasses.fields(Batch) if f.name in case}
    return case, Batch(
        **columns,
        aux_hidden_states=case["hidden_states"][None],
        last_hidden_states=case["verifier_last_hidden_states"][None],
    )


SHAPES = Path(__file__).parent / "shapes"
"""Shapes of real verifiers, and configs of published drafts, without weights."""
