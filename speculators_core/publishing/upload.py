"""Plans what a push sends to the hub."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import read_json
from speculators_core.format import checkpoint
from speculators_core.format.checkpoint import is_hub_id
from speculators_core.format.stored_speculator import StoredSpeculator
from speculators_core.provenance import hash_weights
from speculators_core.publishing.card import CARD, complete, license_of, make_card, parse, read_text
from speculators_core.publishing.card_facts import CardFacts

RECORDS = (
    "config.yaml",
    "run.json",
    "training_log.json",
    "training_log.jsonl",
    "log.jsonl",
    "report.json",
    "acceptance.png",
    "acceptance-dark.png",
    "certificate.json",
    "certificate.html",
)
"""Records of how a checkpoint was made, and of measurements on it."""
LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt")
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
SECRET = re.compile(rb"\b(?:hf_|sk-)[A-Za-z0-9_-]{20,}")
"""Access tokens of the hub and of OpenAI-like servers."""
BINARY = (".safetensors", ".png")


@dataclass(frozen=True)
class Upload:
    """Files for the hub, with their content where it differs from the local file."""

    repository: str
    speculator: StoredSpeculator
    verifier: str
    files: dict[str, Path | bytes]
    left_out: tuple[str, ...]
    """Everything else in the folder."""

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes in bytes, by name."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }

    def replaces(self, name: str) -> bool:
        """Whether a file on the hub is of an earlier push and has no successor in this one."""
        was_pushed = name in RECORDS or WEIGHTS.fullmatch(name) is not None
        return was_pushed and name not in self.files


def plan_upload(
    folder: Path, repo: str, verifier: str | None = None, license: str | None = None
) -> Upload:
    """What a push would send, from the folder alone.

    ``verifier`` replaces the name in the uploaded config; ``license`` is put into the uploaded card
    where the local one names none.

    Raises:
        SpeculatorError: the folder holds no sound speculator, others could not load its verifier,
            no licence is named, or the hub's id is none.
    """
    _check_id(repo, "owner/name")
    speculator = _open_speculator(folder)
    verifier = _public_verifier(speculator, verifier)
    files: dict[str, Path | bytes] = dict(_own_files(folder))
    if verifier != speculator.config.verifier.name_or_path:
        files[checkpoint.CONFIG] = _config_naming(speculator, verifier)
    local = read_text(folder / CARD) if CARD in files else None
    card = _card(folder, local, repo, verifier, license)
    if card != local:
        files[CARD] = card.encode()
    for name, content in files.items():
        _check_secrets(folder / name, content)
    others = {path.name: path.is_dir() for path in folder.iterdir() if path.name not in files}
    return Upload(
        repository=repo,
        speculator=speculator,
        verifier=verifier,
        files=dict(sorted(files.items())),
        left_out=tuple(f"{name}/" if is_dir else name for name, is_dir in sorted(others.items())),
    )


def _check_id(name: str, expected: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        told = first_line(error).rstrip(".")
        raise SpeculatorError(
            f"{name!r} is not a hub id ({told}); expected {expected}. Correct the name."
        ) from error
    if expected == "owner/name" and "/" not in name:
        raise SpeculatorError(
            f"{name!r} names no owner; expected {expected}, as `me/{name}`. Put your user name or "
            "organization before it."
        )


def _open_speculator(folder: Path) -> StoredSpeculator:
    """A speculator whose tensors are sound."""
    if not folder.is_dir():  # or it would be taken for a hub id
        raise SpeculatorError(
            f"{folder}: no such folder; expected one that holds a speculator. Correct the path."
        )
    inner = folder / "speculator"
    if not (folder / checkpoint.CONFIG).exists() and (inner / checkpoint.CONFIG).exists():
        raise SpeculatorError(
            f"{folder} is the folder of a run; expected that of a speculator. Push the one in it: "
            f"{inner}."
        )
    speculator = StoredSpeculator.open(folder)
    speculator.check_tensors()
    return speculator


def _public_verifier(speculator: StoredSpeculator, asked: str | None) -> str:
    if asked is not None:
        _check_id(asked, "the verifier's")
        return asked
    folder, name = speculator.folder, speculator.config.verifier.name_or_path
    if name is None:
        raise SpeculatorError(
            f"{folder / checkpoint.CONFIG} names no verifier; expected a hub id in "
            "speculators_config.verifier.name_or_path. Pass --verifier <its hub id>."
        )
    if not is_hub_id(name, folder):
        raise SpeculatorError(
            f"{folder / checkpoint.CONFIG} names the verifier {name!r}, a folder of this machine "
            "that others cannot load; expected a hub id. Pass --verifier <its hub id>; your folder "
            "stays as it is."
        )
    return name


def _own_files(folder: Path) -> dict[str, Path]:
    """The checkpoint's own files, by name.

    Raises:
        SpeculatorError: one is a link out of the folder, or a record is of other weights.
    """
    weights = {tensor.file.name for tensor in checkpoint.stored_tensors(folder).values()}
    names = {checkpoint.CONFIG, checkpoint.INDEX, CARD, *weights, *RECORDS, *LICENSES}
    found = {name: folder / name for name in sorted(names) if (folder / name).is_file()}
    for path in found.values():
        if path.resolve().parent != folder.resolve():
            raise SpeculatorError(
                f"{path} is a link to {path.resolve()}; expected a file in the folder "
                "itself. Copy it there, or remove the link."
            )
    for name in ("certificate.json", "report.json"):
        if name in found:
            _check_record(found[name])
    return found


def _check_record(path: Path) -> None:
    """Raises SpeculatorError where a record says that it is of other weights."""
    record = read_json(path)
    drafts = record.get("drafts")
    parts = [part for part in drafts if isinstance(part, dict)] if isinstance(drafts, list) else []
    stated = [record.get("speculator_sha256"), *(part.get("sha256") for part in parts)]
    if any(stated) and hash_weights(path.parent) not in stated:
        raise SpeculatorError(
            f"{path} is of other weights than those beside it; expected their hash in it. Make it "
            "again, or remove it."
        )


def _config_naming(speculator: StoredSpeculator, verifier: str) -> bytes:
    """``config.json`` with that verifier; the other keys are unchanged."""
    assert speculator.config.speculators_config is not None
    stated = speculator.config.speculators_config.model_dump(mode="json")
    stated["verifier"]["name_or_path"] = verifier
    written = {**speculator.raw, "speculators_config": stated}
    return (json.dumps(written, indent=2, sort_keys=True) + "\n").encode()


def _card(folder: Path, local: str | None, repo: str, verifier: str, license: str | None) -> str:
    """The card that is uploaded.

    Raises:
        SpeculatorError: it names no licence, or another one than ``license``.
    """
    if local is None and license is None:
        raise SpeculatorError(
            f"{folder} holds no {CARD}, expected a model card. Write one whose front matter "
            "names a licence, or pass --license to generate one from the checkpoint."
        )
    text = make_card(folder, CardFacts(license=license)) if local is None else local
    named = license_of(parse(text, folder / CARD))
    if named is None and license is None:
        raise SpeculatorError(
            f"{folder / CARD} names no licence, expected one. Write `license: <its name>` into its "
            "front matter, or pass --license."
        )
    if license is not None and named not in (None, license):
        raise SpeculatorError(
            f"{folder / CARD} names the licence {named!r}, --license {license!r}; expected one. "
            "Correct the card, or leave --license out."
        )
    return complete(text, repo, verifier, license)


def _check_secrets(path: Path, content: Path | bytes) -> None:
    if path.suffix in BINARY:
        return
    text = content if isinstance(content, bytes) else content.read_bytes()
    if found := SECRET.search(text):
        line = text[: found.start()].count(b"\n") + 1
        raise SpeculatorError(
            f"{path}, line {line}: {found[0][:6].decode()}... looks like an access token; "
            "expected no secret in what is published. Remove it, and revoke it if others have "
            "seen it."
        )
