"""The arrows between packages and rooms point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "speculators_core": ("vllm", "speculators_vllm", "benchmarks"),
    "speculators_vllm": ("benchmarks",),
    "speculators_core/models": ("speculators_core.training", "speculators_core.generation"),
    "speculators_core/generation.py": ("speculators_core.model", "speculators_core.training"),
    "speculators_core/layers.py": ("speculators_core.model",),
    "speculators_core/losses.py": ("speculators_core.model",),
    "speculators_core/masks.py": ("speculators_core.model",),
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_one_way(room):
    path = ROOT / room
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            for forbidden in FORBIDDEN[room]:
                assert name != forbidden and not name.startswith(f"{forbidden}."), (file, name)


def test_core_works_where_vllm_is_not_installed():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import speculators_core.models.eagle3, speculators_core.training.trainer\n"
        "from speculators_core.cli import main\n"
        "main(['acceptance', '--engine', 'vllm'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: vLLM is not installed.")


def test_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text()
    for package in ("speculators_core", "speculators_vllm", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "__init__.py":
                assert f"`{file.relative_to(ROOT).as_posix()}`" in readme, file
