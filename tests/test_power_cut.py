"""After a kill or a power cut at any moment, what the project writes is whole or absent."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speculators_core.data_generation.answers.answer_file import AnswerFile
from speculators_core.data_generation.answers.dialogues import Answer, Dialogue
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.files import read_json, replaced_folder, write_text
from speculators_core.format import checkpoint
from speculators_core.publishing.card import CARD, write_card
from speculators_core.publishing.card_facts import CardFacts
from speculators_core.training.states.state_folder import FILES, newest_state, tidy, write_whole
from speculators_vllm.hidden_states.files import FileWriter, HiddenStates, read_file
from tests.data_generation.making import generated, schema
from tests.data_generation.processes import processes
from tests.power_cut import cut_everywhere

OLD, NEW = 1, 2


@dataclass(frozen=True)
class Kind:
    """How a value is written, and read again: None where there is nothing."""

    write: Callable[[Path, int], object]
    read: Callable[[Path], int | None]
    may_be_absent: bool = False
    """In the middle of a replacement."""


def write_file(folder, value):
    write_text(folder / "file", f"{value}" * 10_000)


def read_file_of_text(folder):
    text = (folder / "file").read_text()
    assert text in ("1" * 10_000, "2" * 10_000)
    return int(text[0])


def write_draft(folder, value):
    """Shards of another number, and other names, each time."""
    tensors = {f"w{i}": torch.full((10,), float(value)) for i in range(value + 2)}
    checkpoint.write_checkpoint(folder, {"value": value}, tensors, max_shard_size=80 // value)


def read_draft(folder):
    if not (folder / checkpoint.CONFIG).exists():
        return None
    value = checkpoint.read_config(folder)["value"]
    stored = checkpoint.stored_tensors(folder)
    assert sorted(stored) == [f"w{i}" for i in range(value + 2)]
    for _, tensor in checkpoint.read_tensors(stored, list(stored)):
        assert (tensor == value).all()
    return value


def read_config(folder):
    return read_json(folder / checkpoint.CONFIG)["value"]


def write_speculator(folder, value):
    with replaced_folder(folder / "speculator") as part:
        write_draft(part, value)
        (part / "run.json").write_text(str(value))


def read_speculator(folder):
    if not (folder / "speculator").exists():
        return None
    value = read_draft(folder / "speculator")
    assert (folder / "speculator" / "run.json").read_text() == str(value)
    return value


def write_state(folder, value):
    tensor = {"tensor": torch.full((50,), float(value))}
    write_whole(
        folder / f"checkpoint-{value}",
        {name: tensor if name.endswith(".safetensors") else f"{value}" for name in FILES},
    )


def read_state(folder):
    tidy(folder)
    state = newest_state(folder)
    return None if state is None else int(load_file(state / FILES[0])["tensor"][0])


def write_states(folder, value):
    states = torch.full((3, 2, 4), float(value))
    FileWriter(folder / "states").write(
        HiddenStates("r", "a", (1, 2), 3, torch.arange(3), states),
    )


def read_states(folder):
    return int(read_file(folder / "states" / "a.safetensors").hidden_states[0, 0, 0])


def write_store(folder, value):
    """A run that makes a shard and ends."""
    store = DiskStore.create(folder / "store", schema(), resume=True)
    store.clean()
    if value > len(store.shard_paths()):
        store.write_shard(value - 1, [generated(value, 30, store.schema)])
    store.close()
    store.complete(json.dumps({"value": value}))


def read_store(folder):
    """Of a run that ended all is there; of another, each shard is there or known as damaged."""
    store = DiskStore.open(folder / "store")
    damaged = store.find_damage()
    if not store.is_complete:
        for path in damaged:
            path.unlink()
        return len(store.shard_paths()) or None
    assert not damaged and len(store) == len(list(store.read()))
    assert read_json(store.folder / "report.json")["value"] == len(store)
    return len(store)


def write_answers(folder, value):
    with AnswerFile(folder / "a.jsonl", {"o": 1}, {}, resume=True) as file:
        for number in range(len(file.done), value):
            dialogue = Dialogue(f"0/{number}", [{"role": "user", "content": "q"}])
            dialogue.take(Answer("a" * 100))
            file.keep(dialogue)


def read_answers(folder):
    with AnswerFile(folder / "a.jsonl", {"o": 1}, {}, resume=True) as file:
        return len(file.done)


def write_card_of(drafts, folder, value):
    if not (folder / checkpoint.CONFIG).exists():
        shutil.copytree(drafts, folder, dirs_exist_ok=True)
    write_card(folder, CardFacts(license="mit" if value == OLD else "apache-2.0"))


def read_card(folder):
    text = (folder / CARD).read_text()
    return OLD if "\nlicense: mit\n" in text else NEW if "\nlicense: apache-2.0\n" in text else 0


KINDS = {
    "file": Kind(write_file, read_file_of_text),
    "checkpoint": Kind(write_draft, read_draft, may_be_absent=True),
    "config": Kind(lambda f, value: checkpoint.write_config(f, {"value": value}), read_config),
    "speculator of a run": Kind(write_speculator, read_speculator, may_be_absent=True),
    "saved state": Kind(write_state, read_state),
    "hidden states": Kind(write_states, read_states),
    "store": Kind(write_store, read_store),
    "answers": Kind(write_answers, read_answers),
    "card": Kind(partial(write_card_of, None), read_card),
}


def cut(name: str, folder: Path, drafts: Path) -> None:
    kind = KINDS[name]
    write = partial(write_card_of, drafts) if name == "card" else kind.write

    def check(place: Path, has_ended: bool) -> None:
        found = kind.read(place)
        allowed = {NEW} if has_ended else {OLD, NEW, *([None] if kind.may_be_absent else [])}
        assert found in allowed, found
        write(place, NEW)
        assert kind.read(place) == NEW

    number = cut_everywhere(
        folder, begin=lambda f: write(f, OLD), write=lambda f: write(f, NEW), check=check
    )
    (folder / "number").write_text(str(number))


@pytest.mark.parametrize("name", KINDS)
def test_it_is_whole_or_absent(name, tmp_path, eagle3_folder):
    process = processes.Process(target=cut, args=(name, tmp_path / "places", eagle3_folder))
    (tmp_path / "places").mkdir()
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    assert int((tmp_path / "places" / "number").read_text()) >= 3


ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    # A manifest gets another name before its state is removed.
    "speculators_core/training/states/state_folder.py",
    # Memory, which others see when it is locked.
    "speculators_core/data_generation/queues/shared_memory.py",
    # Lines are appended, and on disk at the end.
    "speculators_core/data_generation/answers/answer_file.py",
}


def test_nobody_else_puts_files_in_their_place():
    """One module knows how."""
    pattern = re.compile(r"os\.(replace|rename|fsync)\b|\bfcntl\b|\.rename\(|O_EXCL")
    found = {
        str(path.relative_to(ROOT))
        for package in ("speculators_core", "speculators_vllm", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        if pattern.search(path.read_text())
    }
    assert found == {"speculators_core/files.py", *ELSEWHERE}
