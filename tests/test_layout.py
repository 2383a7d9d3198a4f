"""The arrows between packages and rooms point one way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = {
    "speculators_core": ("vllm", "speculators_vllm", "benchmarks"),
    "speculators_vllm": ("benchmarks",),
    "speculators_core/models": ("speculators_core.training", "speculators_core.generation"),
    "speculators_core/generation.py": ("speculators_core.model", "speculators_core.training"),
    "speculators_core/feature_draft.py": ("speculators_core.models", "speculators_core.training"),
    "speculators_core/eagle_stack.py": ("speculators_core.models", "speculators_core.training"),
    "speculators_core/layers.py": ("speculators_core.model", "speculators_core.models"),
    "speculators_core/masks.py": ("speculators_core.model", "speculators_core.layers"),
    "speculators_core/attention.py": ("speculators_core",),
    "speculators_core/drafter.py": ("speculators_core",),
    "speculators_core/batch.py": ("speculators_core",),
    "speculators_core/acceptance.py": ("speculators_core",),
    "speculators_core/losses.py": ("speculators_core.model", "speculators_core.layers"),
}
"""Rooms, and what stands above them: it knows them, they do not know it."""


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", ABOVE)
def test_imports_point_one_way(room):
    path = ROOT / room
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            for forbidden in ABOVE[room]:
                assert name != forbidden and not name.startswith(f"{forbidden}."), (file, name)


def test_core_works_where_vllm_is_not_installed():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from speculators_core.config import reload_and_populate_models\n"
        "import speculators_core.training.trainer\n"
        "reload_and_populate_models()\n"
        "from speculators_core.cli import main\n"
        "main(['acceptance', '--engine', 'vllm'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: vLLM is not installed.")


def test_no_algorithm_knows_another():
    models = {path.stem for path in (ROOT / "speculators_core/models").glob("*.py")} - {"__init__"}
    assert models >= {"eagle3", "peagle", "dflash", "mtp"}
    for name in models:
        names = imported(ROOT / f"speculators_core/models/{name}.py")
        assert not names & {f"speculators_core.models.{other}" for other in models - {name}}


def test_readme_lists_every_file_in_under_ten_words():
    readme = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\S+\.py)` \| (.+) \|$", readme, re.MULTILINE))
    files = {
        file.relative_to(ROOT).as_posix()
        for package in ("speculators_core", "speculators_vllm", "benchmarks")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert files == set(rows)
    for file, purpose in rows.items():
        assert len(purpose.split()) < 10, file
