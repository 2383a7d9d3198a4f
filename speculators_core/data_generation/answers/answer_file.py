"""Files that a run of ``speculators regenerate`` writes.

answers.jsonl                    answered conversations, one per line
answers.jsonl.set_aside.jsonl    keys of the others, with the reason
answers.jsonl.yaml               options and versions
answers.jsonl.log                progress
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

import yaml
from pydantic import BaseModel, JsonValue, ValidationError

from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.files import make_folder, try_lock, write_text
from speculators_core.provenance import versions
from speculators_core.settings import flat, load_yaml

if TYPE_CHECKING:  # it loads Transformers
    from speculators_core.data_generation.answers.dialogues import Dialogue


class _Line(BaseModel):
    key: str
    reason: str | None = None


class AnswerFile:
    """Keeps dialogues that have ended; ``done`` has those of earlier runs."""

    def __init__(
        self,
        path: Path,
        options: Mapping[str, JsonValue],
        run: Mapping[str, JsonValue],
        resume: bool,
        as_tokens: bool = False,
    ) -> None:
        """``as_tokens``: token ids are written instead of messages. ``options`` decide the answers:
        a resumed run must have the same ones. Those of ``run`` may differ.

        Raises:
            SpeculatorError: there is an output and ``resume`` is not set, or it was made with other
                options or by something else, or another run is writing it.
        """
        self.path = path
        self._as_tokens = as_tokens
        self.done: set[str] = set()
        """Keys of dialogues that were kept or set aside."""
        self.num_kept = 0
        self.reasons: Counter[str] = Counter()
        """Reasons for setting the others aside, with their counts."""
        stated, aside = beside(path, "yaml"), beside(path, "set_aside.jsonl")
        with ExitStack() as opened, _naming(path):
            make_folder(path.parent)
            self._kept = opened.enter_context(path.open("ab", buffering=0))
            self._aside = opened.enter_context(aside.open("ab", buffering=0))
            if not try_lock(self._kept.fileno()):
                raise SpeculatorError(
                    f"--output: another run is writing {path}. Wait until it ends, or choose "
                    "another path."
                )
            if _holds_answers(path):
                if not resume:
                    raise _exists(path)
                _compare(stated, options)
            content = {"options": dict(options), "run": dict(run), "versions": versions()}
            write_text(stated, yaml.safe_dump(content, sort_keys=False))
            for file in (self._kept, self._aside):
                for line in _whole_lines(file):
                    if line.key not in self.done:  # a conversation may have several rows of tokens
                        self._count(line.reason)
                    self.done.add(line.key)
            self._opened = opened.pop_all()

    def keep(self, dialogue: "Dialogue") -> None:
        """Raises:
        SpeculatorError: it cannot be written.
        """
        file = self._kept if dialogue.fault is None else self._aside
        records = self._records(dialogue)
        lines = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in records).encode()
        with _naming(file.name):
            if file.write(lines) != len(lines):
                raise OSError("no space left")
        self._count(dialogue.fault)

    def _records(self, dialogue: "Dialogue") -> list[dict[str, object]]:
        key: dict[str, object] = {"key": dialogue.key}
        if dialogue.fault is not None:
            return [key | {"reason": dialogue.fault}]
        if self._as_tokens:
            return [
                key | {"input_ids": row.input_ids, "loss_mask": row.loss_mask}
                for row in dialogue.token_rows
            ]
        record = key | {"messages": dialogue.messages, "tools": dialogue.tools or None}
        if dialogue.template_options:
            record["chat_template_kwargs"] = dialogue.template_options
        return [record]

    def _count(self, fault: str | None) -> None:
        if fault is None:
            self.num_kept += 1
        else:
            self.reasons[fault] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._opened, _naming(self.path):
            for file in (self._kept, self._aside):
                os.fsync(file.fileno())


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpeculatorError(
            f"--output: {path} cannot be written: {first_line(error)}; expected a writable file "
            "with room. Make room and pass --resume, or choose another path."
        ) from error


def check_free(path: Path, resume: bool) -> None:
    """Checks an output before anything heavy is loaded.

    Raises:
        SpeculatorError: it exists and is not to be resumed.
    """
    if not resume and _holds_answers(path):
        raise _exists(path)


def _holds_answers(path: Path) -> bool:
    files = (path, beside(path, "set_aside.jsonl"))
    return any(file.exists() and file.stat().st_size for file in files)


def _exists(path: Path) -> SpeculatorError:
    return SpeculatorError(
        f"--output: {path} already exists. Pass --resume to append to it, or choose another path."
    )


def beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def _whole_lines(file: BinaryIO) -> Iterator[_Line]:
    """The lines. An unfinished last line is removed, and everything from zero bytes on.

    Raises:
        SpeculatorError: a line is not a record of a dialogue.
    """
    end = 0
    with open(file.name, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n") or b"\0" in line:  # zeros: after a power cut
                break
            try:
                yield _Line.model_validate_json(line)
            except ValidationError as error:
                raise SpeculatorError(
                    f"{file.name}, line {number}: {first_fault(error)}; expected a record of "
                    "regenerate. Remove the line, or choose another --output."
                ) from error
            end += len(line)
    file.truncate(end)


def _compare(stated: Path, options: Mapping[str, JsonValue]) -> None:
    try:
        earlier = load_yaml(stated.read_text(encoding="utf-8"))["options"]
        before, now = flat(earlier), flat(options)
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise SpeculatorError(
            f"{stated} does not state the options of its output, expected those of the run to "
            "resume. Restore it, or choose another --output."
        ) from error
    for name in now | before:
        if before.get(name) != now.get(name):
            raise SpeculatorError(
                f"{stated}: made with {name} {before.get(name)!r}, but it is now "
                f"{now.get(name)!r}. Resume with the same options, or choose another --output."
            )
