"""The wheel holds what it needs: built, installed elsewhere and used from another folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("speculators_core", "speculators_vllm", "benchmarks")

pytestmark = pytest.mark.slow


def run(*command, cwd):
    """What the command prints, with no package of this checkout on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packaged: a build leaves files beside its source, and takes up old ones."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, source, cwd=folder)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Folder of a fresh environment's programs; other packages are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    programs = folder / "bin"
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", programs / "python", "install")
    run(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Its own .pth files are not read, so an editable install of this checkout is not seen.
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return programs


def test_every_file_of_the_packages_is_in_the_wheel(source, wheel):
    files = [file for name in PACKAGES for file in (source / name).rglob("*") if file.is_file()]
    expected = {file.relative_to(source).as_posix() for file in files}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_packages_and_their_data_come_from_the_wheel(installed, tmp_path):
    code = (
        "import benchmarks.playground, benchmarks.training, speculators_core, speculators_vllm;"
        "print(benchmarks.playground.VERIFIER, benchmarks.training.PEERS / 'acceptance.json',"
        "speculators_core.__file__, speculators_vllm.__file__)"
    )
    for file in run(installed / "python", "-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed.parent) and Path(file).exists()


def test_commands_have_their_help(installed, tmp_path):
    listed = run(installed / "speculators", "--help", cwd=tmp_path)
    assert "acceptance" in listed and "train" in listed
    assert "--max-tokens" in run(installed / "speculators", "acceptance", "--help", cwd=tmp_path)


def test_acceptance_is_measured_on_the_playground(installed, tmp_path):
    options = "--engine transformers --limit-per-category 1 --max-tokens 4 --output report".split()
    shown = run(installed / "speculators", "acceptance", *options, cwd=tmp_path)
    for name in ("eagle3", "peagle", "dflash", "mtp"):
        assert name in shown
    assert (tmp_path / "report" / "report.json").exists()


def test_training_steps_are_measured(installed, tmp_path):
    smallest = "--steps.lengths 16 --steps.timed 1 --steps.hidden-size 64 --steps.vocab-size 16"
    options = ("--parts", "steps", "--algorithms", "mtp", *smallest.split())
    shown = run(installed / "python", "-m", "benchmarks.training", *options, cwd=tmp_path)
    assert "training step" in shown
