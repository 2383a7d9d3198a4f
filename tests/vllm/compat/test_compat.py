"""What stock vLLM serves is served with the plug-in, with as many accepted tokens.

Speculation is lossless: equal texts alone would hide a draft that was misread. So accepted tokens
are compared position by position. DFlash's layers have the same key norm here: vLLM's kernel on
CPUs takes one for all, which the plug-in repairs. One draft with different norms shows the repair.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import playground
from speculators_core.decoding.prompts import read_prompts, tokenize
from tests.vllm.compat.changes import DRAFTS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SAMPLE = ("eagle3, one shard", "eagle3, names of the authors", "eagle3, pickled")
"""Served in `make test`; all others by `make test-compat`."""
METHODS = {
    "eagle3": {"method": "eagle3", "num_speculative_tokens": 3},
    "peagle": {"method": "eagle3", "num_speculative_tokens": 4, "parallel_drafting": True},
    "dflash": {"method": "dflash", "num_speculative_tokens": 5},
}
"""What stock vLLM has to be told; the plug-in reads it from the checkpoint."""


@dataclass(frozen=True)
class Served:
    """What one draft gave on one side."""

    token_ids: list[list[int]]
    accepted: list[int]
    """Tokens kept of each draft."""

    @property
    def by_position(self) -> list[int]:
        return [sum(kept >= place for kept in self.accepted) for place in range(1, 7)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serves the named drafts with the plug-in and, those that it can, without, at one time."""

    def serve(names: Iterable[str], num_prompts: int, max_tokens: int):
        folder = tmp_path_factory.mktemp("compat")
        found = tokenize(read_prompts(playground.PROMPTS), _tokenizer(), 2048)
        asked = {"prompts": [p.token_ids[:60] for p in found[:: len(found) // num_prompts]]}
        asked |= {"prompts": asked["prompts"][:num_prompts], "max_tokens": max_tokens}
        ours, stock = {}, {}
        for number, name in enumerate(names):
            draft, path = DRAFTS[name], folder / f"draft-{number}"
            draft.write(path)
            ours[name] = {"model": str(path)}
            if draft.is_stock:
                stock[name] = {"model": str(path), **METHODS[draft.algorithm]}
        sides = {"plugin": (ours, None), "stock": (stock, "")}
        processes = [
            _start(folder, side, {**asked, "settings": settings}, plugins)
            for side, (settings, plugins) in sides.items()
        ]
        for process in processes:
            assert process.wait() == 0, (folder / "plugin.log").read_text()[-3000:]
        return tuple(_read(folder / f"{side}.jsonl") for side in sides)

    return serve


def _tokenizer():
    return AutoTokenizer.from_pretrained(playground.VERIFIER)


def _start(folder: Path, side: str, job: dict, plugins: str | None) -> subprocess.Popen:
    (folder / f"{side}.json").write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if k not in ("VLLM_PLUGINS", "LD_PRELOAD")}
    environment |= {} if plugins is None else {"VLLM_PLUGINS": plugins}
    command = [sys.executable, "-m", "tests.vllm.compat.serve"]
    with (folder / f"{side}.log").open("w") as log:
        return subprocess.Popen(
            [*command, str(folder / f"{side}.json"), str(folder / f"{side}.jsonl")],
            cwd=Path(__file__).parents[3],
            env=environment,
            stdout=log,
            stderr=log,
        )


def _read(file: Path) -> dict[str, Served | str]:
    """Answers by name; the error of one that was refused."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        row["name"]: row.get("error")
        or Served(row["token_ids"], [kept for one in row["accepted"] for kept in one])
        for row in rows
    }


def compare(ours: dict[str, Served | str], stock: dict[str, Served | str]) -> list[str]:
    """Every difference that matters, in a line."""
    faults = []
    for name, found in ours.items():
        draft, theirs = DRAFTS[name], stock.get(name)
        if isinstance(found, str):
            faults.append(f"{name}: refused: {found}")
            continue
        if isinstance(theirs, str):
            faults.append(f"{name}: stock vLLM refuses it: {theirs}")
            continue
        plain = ours.get(f"{draft.algorithm}, as it is")
        if draft.is_same and isinstance(plain, Served) and found != plain:
            faults.append(f"{name}: {found.by_position} kept, unchanged {plain.by_position}")
        if theirs is None:
            continue
        if found.token_ids != theirs.token_ids:
            faults.append(f"{name}: other texts")
        gains = draft.gains and len(found.accepted) <= len(theirs.accepted)
        if found.by_position != theirs.by_position and not gains:
            faults.append(f"{name}: {found.by_position} kept, stock {theirs.by_position}")
    return faults


def test_drafts_of_other_writers_are_served_as_by_stock_vllm(served):
    ours, stock = served(SAMPLE, num_prompts=2, max_tokens=16)
    assert compare(ours, stock) == []
    first, *others = ours.values()
    assert all(other == first for other in others) and sum(first.accepted) > 5


@pytest.mark.compat
def test_fifty_drafts_are_served_as_by_stock_vllm(served):
    assert sum(draft.is_stock for draft in DRAFTS.values()) >= 50
    ours, stock = served(DRAFTS, num_prompts=4, max_tokens=24)
    assert compare(ours, stock) == []
    assert ours.keys() == DRAFTS.keys()
    for name, found in ours.items():
        assert sum(found.accepted) > 5, name
