"""Fixtures of the proofs."""

import pytest

from speculators_core.registry import CONFIGS, MODELS, PROPOSALS
from tests.hub import Hub, connected


@pytest.fixture
def hub(tmp_path):
    with Hub().serving() as hub, connected(hub, tmp_path / "home") as patch:
        patch.setattr("transformers.utils.hub._hf_api", None)  # keeps the first hub's address
        yield hub


@pytest.fixture(autouse=True)
def forgets():
    """What a proof registers is unknown to the next one."""
    yield
    for registry in (CONFIGS, MODELS, PROPOSALS):
        registry._added.clear()
