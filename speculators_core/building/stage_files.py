"""Folders of stages, named by plan and input.

build/
    build.yaml              the plan in full, which repeats the build
    1-prompts-3f2a91c0/     a folder for each stage and for each plan of it
        stage.json          written at the end: plan, inputs, digest of the output, report
    speculator              link to the speculator of the last build that came to its end

The name ends with a digest of the stage's plan and of its input. Another plan or another input is
another folder, so that nothing is overwritten, and an earlier plan finds its folders again.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, ValidationError

from speculators_core.errors import SpeculatorError, first_fault
from speculators_core.files import write_text
from speculators_core.settings import Settings

STAGE = "stage.json"
SHOWN = 8
"""Digits of a digest in a folder's name."""


class StageRecord(Settings):
    """The end of a stage."""

    format: Literal["speculators-stage-1"] = "speculators-stage-1"
    stage: str
    made_of: dict[str, JsonValue]
    """The stage's plan, and digests of its inputs."""
    output: dict[str, str]
    """Digests of the parts of the stage's output."""
    seconds: float = Field(ge=0)
    """Seconds of the run that came to the end."""
    report: dict[str, JsonValue] = Field(default_factory=dict)


@dataclass(frozen=True)
class StageFolder:
    """Where a stage with this plan and these inputs is."""

    build: Path
    number: int
    name: str
    made_of: dict[str, JsonValue]

    @cached_property
    def path(self) -> Path:
        text = json.dumps(self.made_of, sort_keys=True)
        digest = sha256(text.encode()).hexdigest()[:SHOWN]
        return self.build / f"{self.number}-{self.name}-{digest}"

    @property
    def has_begun(self) -> bool:
        return self.path.is_dir() and any(self.path.iterdir())

    def read(self) -> StageRecord | None:
        """The record of the stage's end; None where it has not come to its end.

        Raises:
            SpeculatorError: the file is damaged, or not of this stage.
        """
        file = self.path / STAGE
        try:
            record = StageRecord.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            fault = first_fault(error) if isinstance(error, ValidationError) else error.strerror
            raise SpeculatorError(
                f"{file} is not the record of a stage: {fault}; expected the file that the build "
                f"wrote. Restore it, or delete it to run the stage again from what it has kept."
            ) from error
        if record.made_of != self.made_of:
            raise SpeculatorError(
                f"{file} states another plan or input than its folder's name; expected the file "
                "that the build wrote. Restore it, or delete the folder to make it again."
            )
        return record

    def write(self, record: StageRecord) -> None:
        """Raises:
        OSError: it cannot be written.
        """
        write_text(self.path / STAGE, record.model_dump_json(indent=2))


def check_unchanged(folder: StageFolder, record: StageRecord, found: dict[str, str]) -> None:
    """Checks that a stage's output is what the stage wrote.

    Raises:
        SpeculatorError: a part of it was changed or removed since.
    """
    for part in {**record.output, **found}:
        before, now = record.output.get(part), found.get(part)
        if before != now:
            what = "is missing" if now is None else "was changed"
            raise SpeculatorError(
                f"{folder.path / part} {what} after stage {folder.name} had written it; expected "
                "it as it was. Restore it, or delete the folder "
                f"{folder.path.name} to run the stage and those after it again."
            )
