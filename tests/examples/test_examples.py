"""Every example runs as it stands, on the playground."""

import runpy

import pytest

from docs.generated import ROOT
from speculators_core.registry import CONFIGS, MODELS

ON_VLLM = ["on_vllm"]
FILES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


def marked(name: str):
    return pytest.param(name, marks=pytest.mark.docs) if name in ON_VLLM else name


@pytest.fixture(autouse=True)
def forgets():
    yield
    for registry in (CONFIGS, MODELS):
        registry._added.clear()


@pytest.mark.parametrize("name", map(marked, FILES))
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FILES[name]))
    assert capsys.readouterr().out
