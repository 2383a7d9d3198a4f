import os
import subprocess
import sys

import pytest

from speculators_vllm import openmp

needs_library = pytest.mark.skipif(
    openmp.library() is None, reason="vLLM for a GPU brings no libiomp5"
)


def output_of(code):
    """What a process prints that inherits no library from an engine that ran here before."""
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.split()


@needs_library
def test_the_library_is_under_torch_and_the_environment_is_left_alone():
    code = (
        "import os; before = dict(os.environ)\n"
        "from speculators_vllm import openmp\n"
        "print(openmp.preload(), dict(os.environ) == before)\n"
        "import torch\n"
        "print('libiomp5' in open('/proc/self/maps').read(), openmp.preload())"
    )
    assert output_of(code) == ["True"] * 4


@needs_library
def test_it_comes_too_late_where_torch_was_imported():
    code = "import torch\nfrom speculators_vllm import openmp\nprint(openmp.preload())"
    assert output_of(code) == ["False"]


@needs_library
def test_it_is_named_once_and_first_for_children(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ["LD_PRELOAD"] = "other.so"
    for _ in range(2):
        openmp.preload_in_children()
        assert os.environ["LD_PRELOAD"] == f"{openmp.library()}:other.so"
    assert openmp.variables() == {}


def test_nothing_is_named_where_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    assert openmp.library() is None
    assert not openmp.preload()
    assert openmp.variables() == {}
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / openmp.LIBRARY).touch()
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert openmp.library() is None
