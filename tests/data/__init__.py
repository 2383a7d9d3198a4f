"""Data of the tests: ``interop`` holds a speculator trained by another implementation."""

import json
from pathlib import Path
from typing import Any

INTEROP = Path(__file__).parent / "interop"


def interop_acceptance() -> dict[str, Any]:
    """Prompts, the verifier's own outputs and the accepted counts, as recorded from stock vLLM."""
    return json.loads((INTEROP / "acceptance.json").read_text())
