"""The arrows between packages and rooms point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = (
    "errors settings flags registry console provenance batch files http cli __main__ __init__ "
    "config inference model proposals"
).split()
FLOORS = (
    "texts format verifier decoding models diagnosis data_generation publishing training building "
    "commands"
).split()
"""Rooms of the core from the ground up: each may import those before it."""
BESIDE = {"data_generation": {"models", "diagnosis", "decoding"}}
"""Lower floors that a room does not know all the same: data are generated without drafts."""
ABOVE = {
    "speculators_core": ("vllm", "speculators_vllm", "benchmarks"),
    "speculators_vllm": ("benchmarks",),
    "speculators_core/models/parts": (
        "speculators_core.models.speculator",
        "speculators_core.models.verifier_side",
        "speculators_core.models.feature_draft",
        "speculators_core.models.eagle_stack",
    ),
    "speculators_core/models/parts/masks.py": ("speculators_core.models.parts.layers",),
    "speculators_core/models/parts/attention.py": ("speculators_core",),
    "speculators_core/decoding/drafter.py": ("speculators_core",),
    "speculators_core/decoding/acceptance.py": ("speculators_core",),
    "speculators_core/batch.py": ("speculators_core",),
    "speculators_vllm/plugin": ("speculators_vllm.verdicts", "speculators_vllm.generation"),
    "speculators_vllm/hidden_states": (
        "speculators_vllm.verdicts",
        "speculators_vllm.generation",
        "speculators_vllm.plugin",
    ),
}
"""Rooms and files, and what stands above them: it knows them, they do not know it."""


def imports(path: Path) -> set[str]:
    """Full names of what a file imports; a module from its package counts as that module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_of_the_core_stands_on_lower_floors():
    core = ROOT / "speculators_core"
    rooms = {path.parent.name for path in core.glob("*/__init__.py")}
    assert rooms <= set(FLOORS)
    assert {path.stem for path in core.glob("*.py")} <= set(GROUND)
    for file in sorted(core.rglob("*.py")):
        place = file.relative_to(core).parts
        room = place[0] if len(place) > 1 else None
        for name in imports(file):
            _, _, rest = name.partition("speculators_core.")
            other = rest.split(".")[0]
            if other in FLOORS and other != room and file.name != "__init__.py":
                assert room, f"{file} is on the ground and imports {name}"
                assert FLOORS.index(other) < FLOORS.index(room), (file, name)
                assert other not in BESIDE.get(room, ()), (file, name)


def test_no_modules_import_each_other_in_a_circle():
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for package in ("speculators_core", "speculators_vllm", "benchmarks")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    arrows = {
        module: {
            found
            for name in imports(file)
            for found in (name, name.rpartition(".")[0])
            if found in files
        }
        for module, file in files.items()
    }
    while ends := {module for module, found in arrows.items() if not found}:
        arrows = {m: found - ends for m, found in arrows.items() if m not in ends}
    assert not arrows


@pytest.mark.parametrize("room", ABOVE)
def test_imports_point_one_way(room):
    path = ROOT / room
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            for forbidden in ABOVE[room]:
                assert name != forbidden and not name.startswith(f"{forbidden}."), (file, name)


def test_core_works_where_vllm_is_not_installed():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from speculators_core.format.config import reload_and_populate_models\n"
        "import speculators_core.training.trainer\n"
        "reload_and_populate_models()\n"
        "from speculators_core.cli import main\n"
        "main(['acceptance', '--engine', 'vllm'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: vLLM is not installed.")


def test_no_algorithm_knows_another():
    models = {"eagle3", "peagle", "dflash", "mtp"}
    for name in models:
        names = imports(ROOT / f"speculators_core/models/{name}.py")
        others = tuple(f"speculators_core.models.{other}." for other in models - {name})
        assert not [found for found in names if f"{found}.".startswith(others)]
