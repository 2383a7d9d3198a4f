"""What a package offers from its top, without loading anything for it."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FACES = ("speculators_core", "speculators_vllm.hidden_states")
HEAVY = ("torch", "transformers", "pydantic", "vllm", "numpy", "safetensors")


@pytest.mark.parametrize("face", FACES)
def test_every_name_can_be_imported(face):
    module = import_module(face)
    for name in module.__all__:
        assert getattr(module, name).__module__.startswith(face), name
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("face", FACES)
def test_type_checkers_see_the_same_names(face):
    module = import_module(face)
    (block,) = [n for n in ast.parse(Path(module.__file__).read_text()).body if type(n) is ast.If]
    shown = {
        (node.module, alias.name) for node in block.body for alias in node.names if alias.asname
    }
    assert shown == {(f"{face}.{found}", name) for name, found in module._MODULE_OF.items()}


@pytest.mark.parametrize("face", FACES)
def test_a_name_that_is_not_offered_is_an_attribute_error(face):
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = import_module(face).Nothing


@pytest.mark.parametrize("face", FACES)
def test_importing_a_face_loads_nothing(face):
    code = (
        f"import sys; import {face}; "
        f"print([name for name in {HEAVY} if name in sys.modules], "
        f"len([name for name in sys.modules if name.startswith('speculators')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    parts = face.count(".") + 1
    assert done.stdout.strip() == f"[] {parts}", done.stderr
