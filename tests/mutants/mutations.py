"""Faults of one file or one flag, drawn by a seed."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.mutants.material import COMMANDS, DRAFTS

ODD = [
    None, True, 0, -1, 1, 2, 3, 7, 1.5, -0.5, 2**31, 2**70, 1e308, float("nan"), float("inf"),
    "", " ", "x", "7", "\u2028", "../..", "/dev/null", "a\nb", "\0", "caf\u00e9", "x" * 5000,
    [], [None], [0], [1, 2], [-1], ["x"], [[]], [2, 2, 2], [3, 1, 2], {}, {"a": 1}, {"": {}},
]  # fmt: skip
"""Values in place of others."""
READERS_OF_DRAFTS = ("check", "certify", "acceptance", "push", "train from")
READERS_OF_VERIFIERS = ("check", "certify", "acceptance", "train", "train texts", "generate-data")
READERS_OF_TEXTS = ("check", "acceptance", "generate chats", "train texts")
TRAINING = ("train", "dry run")


@dataclass(frozen=True)
class Target:
    """A file, its kind, and the commands that read it."""

    file: str
    kind: str
    commands: tuple[str, ...]


TARGETS = [
    *(Target(f"{draft}/config.json", "json", READERS_OF_DRAFTS) for draft in DRAFTS),
    *(Target(f"{draft}/model.safetensors", "tensors", READERS_OF_DRAFTS) for draft in DRAFTS),
    Target("verifier/config.json", "json", READERS_OF_VERIFIERS),
    Target("verifier/generation_config.json", "json", READERS_OF_VERIFIERS),
    Target("verifier/model.safetensors", "tensors", READERS_OF_VERIFIERS),
    Target("verifier/tokenizer.json", "json", READERS_OF_TEXTS),
    Target("verifier/tokenizer_config.json", "json", READERS_OF_TEXTS),
    Target("verifier/chat_template.jinja", "text", READERS_OF_TEXTS),
    Target("prompts.jsonl", "rows", ("check", "certify", "acceptance", "train")),
    Target("rows.jsonl", "rows", ("generate-data",)),
    Target("chats.jsonl", "rows", ("generate chats", "regenerate", "train texts")),
    Target("states/store.json", "json", ("inspect", "verify", "train")),
    Target("states/index.parquet", "bytes", ("inspect", "verify", "train")),
    Target("states/shards", "bytes", ("inspect", "verify", "train")),
    Target("train.yaml", "yaml", TRAINING),
    Target("data.yaml", "yaml", ("generate-data",)),
    Target("texts.yaml", "yaml", ("generate chats", "train texts")),
    Target("", "flags", ("check", "certify", "acceptance", "push", "inspect", "train", "dry run",
                         "generate-data", "regenerate")),
]  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """A changed file or flag."""

    command: str
    draft: str
    file: str
    key: str
    """The key that was changed; empty where it was the whole file."""
    what: str
    content: bytes | None
    """What the file holds then; None if it is gone."""
    flags: tuple[str, ...] = ()

    def is_named_in(self, line: str) -> bool:
        """Whether an error names what was changed: the file or its folder, and the key in it.

        Of tensors and of a tokenizer's parts the file is enough, as other libraries read them. A
        key that contradicts the tensors is as good as these: nobody knows which of both is wrong.
        """
        names = [part for part in self.key.split(".") if not part.isdigit()]
        if self.what == "huge":  # a value as any other; what overflows is named
            return True
        if not self.file:
            return "--" in line or names[-1].strip("-") in line
        name, folder = Path(self.file).name, str(Path(self.file).parent)
        is_plan = name.endswith(".yaml")  # the user named it, and its options have full names
        is_placed = is_plan or name in line or f"{folder}:" in line or f"{folder} " in line
        if name in ("config.json", "generation_config.json", "store.json") or is_plan:
            doubts = ("config.json describes", "by config.json", "config.json or weights differ")
            is_contradiction = any(doubt in line for doubt in doubts)
            return is_placed and (not names or names[-1] in line or is_contradiction)
        return is_placed or "template" in line and "template" in name

    def __str__(self) -> str:
        return f"{self.command} ({self.draft}): {self.file} {self.key} {self.what}"


def mutation(number: int, given: Path, flags_of: Callable[[str], list[str]]) -> Mutation:
    """The mutation of this number; the same for the same number."""
    draw = Random(number)
    target = TARGETS[number % len(TARGETS)]
    command = target.commands[number // len(TARGETS) % len(target.commands)]
    draft = draw.choice(DRAFTS)
    if target.file.split("/")[0] in DRAFTS:
        draft = target.file.split("/")[0]
    if target.kind == "flags":
        flag, value = draw.choice(flags_of(COMMANDS[command])), _as_word(draw.choice(ODD))
        flags = draw.choice([(flag, value), (flag, value), (flag,), (f"{flag}={value}",)])
        return Mutation(command, draft, "", flag, repr(flags)[:80], None, flags)
    file = given / target.file
    if file.is_dir():
        file = draw.choice(sorted(path for path in file.iterdir()))
    name = str(file.relative_to(given))
    content = file.read_bytes()
    if draw.random() < 0.2 or target.kind in ("bytes", "text"):
        what, changed = draw.choice(WHOLE)(content, draw)
        return Mutation(command, draft, name, "", what, changed)
    key, what, changed = KINDS[target.kind](content, draw)
    return Mutation(command, draft, name, key, what, changed)


def _as_word(value: Any) -> str:
    word = value if isinstance(value, str) else json.dumps(value)
    return word.replace("\0", "\x01")  # the system passes no zero on


# ---- whole files ----


def _cut(content: bytes, draw: Random) -> tuple[str, bytes]:
    length = draw.randrange(len(content))
    return f"cut after {length} of {len(content)} bytes", content[:length]


def _flip(content: bytes, draw: Random) -> tuple[str, bytes]:
    at = draw.randrange(len(content))
    return f"byte {at} flipped", content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


WHOLE: list[Callable[[bytes, Random], tuple[str, bytes | None]]] = [
    _cut,
    _cut,
    _flip,
    _flip,
    lambda content, draw: ("gone", None),
    lambda content, draw: ("empty", b""),
    lambda content, draw: ("a byte order mark before", b"\xef\xbb\xbf" + content),
    lambda content, draw: ("UTF-16", content.decode(errors="replace").encode("utf-16")),
    lambda content, draw: ("a list", b"[1, 2]"),
    lambda content, draw: ("null", b"null"),
    lambda content, draw: ("zeros", bytes(64)),
    lambda content, draw: ("nested deeply", b"[" * 100_000),
    lambda content, draw: ("twice", content + content),
]


# ---- keys ----


def _change_json(content: bytes, draw: Random) -> tuple[str, str, bytes]:
    tree = json.loads(content)
    key, what = _change_tree(tree, draw)
    return key, what, json.dumps(tree).encode()


def _change_yaml(content: bytes, draw: Random) -> tuple[str, str, bytes]:
    tree = yaml.safe_load(content)
    key, what = _change_tree(tree, draw)
    return key, what, yaml.safe_dump(tree, allow_unicode=True).encode()


def _change_rows(content: bytes, draw: Random) -> tuple[str, str, bytes]:
    lines = content.splitlines()
    number = draw.randrange(len(lines))
    if draw.random() < 0.2:
        odd = json.dumps(draw.choice(ODD))
        lines[number] = odd.encode()
        return "", f"line {number + 1} is {odd[:60]}", b"\n".join(lines) + b"\n"
    row = json.loads(lines[number])
    key, what = _change_tree(row, draw)
    lines[number] = json.dumps(row, ensure_ascii=draw.random() < 0.5).encode()
    return key, f"in line {number + 1} {what}", b"\n".join(lines) + b"\n"


def _change_tree(tree: Any, draw: Random) -> tuple[str, str]:
    """Changes one place of a tree, in the tree; its key and what was done."""
    places = list(_places(tree, ""))
    # The vocabulary of a tokenizer has thousands of keys, of which one says as much as all.
    named = [place for place in places if not place[0].startswith("model.vocab.")] or places
    path, above, key = draw.choice(named)
    old = above[key]
    if isinstance(above, dict) and draw.random() < 0.15:
        del above[key]
        return path, f"is gone (was {old!r:.40})"
    if isinstance(above, dict) and draw.random() < 0.1:
        other = f"{key}s" if draw.random() < 0.5 else key[:-1]
        above[other] = above.pop(key)
        return path, f"is called {other}"
    value = draw.choice(ODD)
    if type(old) is int and draw.random() < 0.4:
        value = draw.choice([old + 1, old - 1, old * 2, -old, old // 2, float(old), str(old)])
    above[key] = value
    return path, f"is {value!r:.60} (was {old!r:.40})"


def _places(tree: Any, path: str) -> list[tuple[str, Any, Any]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in inner:
        here = f"{path}.{key}" if path else str(key)
        found.append((here, tree, key))
        if isinstance(value, dict | list):
            found += _places(value, here)
    return found


# ---- tensors ----


def _change_tensors(content: bytes, draw: Random) -> tuple[str, str, bytes]:
    """The header of a safetensors file, or values in it."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    change = draw.choice(
        ["nan", "inf", "gone", "extra", "renamed", "shape", "dtype", "offsets", "huge"]
    )
    if change == "nan":
        data[start:end] = b"\xff" * (end - start)
    elif change == "inf":
        pattern = {"F32": b"\x00\x00\x80\x7f", "BF16": b"\x80\x7f"}.get(entry["dtype"], b"\x7f")
        data[start : start + len(pattern)] = pattern
    elif change == "huge":
        pattern = {"F32": b"\xff\xff\x7f\x7f", "BF16": b"\x7f\x7f"}.get(entry["dtype"], b"\x7f")
        data[start : start + len(pattern)] = pattern
    elif change == "gone":
        other = {key: value for key, value in header.items() if key != name}
        return name, "is gone", _without(other, header, data)
    elif change == "extra":
        name = "other.weight"
        header[name] = {**entry, "data_offsets": [len(data), len(data) + end - start]}
        data += data[start:end]
    elif change == "renamed":
        other = draw.choice(
            [f"model.{name}", name.upper(), name.replace("weight", "bias"), "", name[1:]]
        )
        header[other] = header.pop(name)
        change = f"renamed {other}"
    elif change == "shape":
        shape = entry["shape"]
        entry["shape"] = draw.choice([shape[::-1], [*shape, 1], shape[:-1], [0], []])
        change = f"shape {entry['shape']} (was {shape})"
    elif change == "dtype":
        kinds = {
            "F32": ["I32", "U32"],
            "BF16": ["F16", "I16"],
            "I64": ["F64", "U64"],
            "BOOL": ["U8", "I8"],
        }
        entry["dtype"] = draw.choice([*kinds.get(entry["dtype"], ["F32"]), "F8_E4M3", "X7"])
        change = f"dtype {entry['dtype']}"
    else:
        entry["data_offsets"] = draw.choice([[start, end - 1], [-1, end], [end, start], [0, 2**60]])
        change = f"offsets {entry['data_offsets']}"
    return name, change, _packed(header, bytes(data))


def _without(kept: dict, header: dict, data: bytes) -> bytes:
    moved, packed = {}, b""
    for name, entry in kept.items():
        if name == "__metadata__":
            moved[name] = entry
            continue
        start, end = entry["data_offsets"]
        moved[name] = {**entry, "data_offsets": [len(packed), len(packed) + end - start]}
        packed += data[start:end]
    return _packed(moved, packed)


def _packed(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


KINDS: dict[str, Callable[[bytes, Random], tuple[str, str, bytes]]] = {
    "json": _change_json,
    "yaml": _change_yaml,
    "rows": _change_rows,
    "tensors": _change_tensors,
}
