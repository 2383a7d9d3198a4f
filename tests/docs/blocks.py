"""Code blocks of the documentation: found, expanded, and their commands recorded."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from docs.generated import ROOT

RUN = ("bash", "python", "yaml")
"""Languages of blocks that a test runs; all others only show something."""
SHOWN = ("text", "json", "toml")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<rest>.*)$")
TITLE = re.compile(r'title="([^"]+)"')
NOT_RUN = re.compile(r"^<!-- not run: (\S.*) -->$")
SMALLER = re.compile(r"^<!-- smaller in tests: (\S.*) -->$")
SNIPPET = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    title: str | None
    text: str
    not_run: str | None
    """Why no test runs it."""
    smaller: tuple[tuple[str, str], ...]
    """What is replaced in it so that a test takes seconds."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def small_text(self) -> str:
        text = self.text
        for large, small in self.smaller:
            assert large in text, f"{self.place}: {large!r} is not in the block"
            text = text.replace(large, small)
        return text


def pages_in_order() -> list[str]:
    """Pages as the navigation has them, and the README first."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    content = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)

    def walk(node: object) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    written = [page for page in walk(content["nav"]) if (ROOT / "docs" / page).exists()]
    return ["README.md", *(f"docs/{page}" for page in written)]


def blocks_of(page: str) -> list[Block]:
    """Every block of a page, in order."""
    found: list[Block] = []
    lines = (ROOT / page).read_text().splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        indent = fence["indent"]
        end = lines.index(f"{indent}```", number + 1)
        comments = _comments_before(lines, number)
        title = TITLE.search(fence["rest"])
        text = "\n".join(line.removeprefix(indent) for line in lines[number + 1 : end])
        found.append(
            Block(
                page=page,
                line=number + 1,
                language=fence["language"],
                title=title[1] if title else None,
                text=SNIPPET.sub(lambda snippet: (ROOT / snippet[1]).read_text(), text) + "\n",
                not_run=next((m[1] for c in comments if (m := NOT_RUN.match(c))), None),
                smaller=tuple(
                    (large.strip(), small.strip())
                    for c in comments
                    if (m := SMALLER.match(c))
                    for large, small in (pair.split("->") for pair in m[1].split(";"))
                ),
            )
        )
        number = end + 1
    return found


def _comments_before(lines: list[str], number: int) -> list[str]:
    comments = []
    while number and (lines[number - 1].strip().startswith("<!--")):
        number -= 1
        comments.append(lines[number].strip())
    return comments


RECORDER = """
command_not_found_handle() { printf '%s\\0' "$#" "$@" >> "$RECORD"; }
source() { :; }
cd() { :; }
kill() { :; }
wait() { :; }
"""
"""With an empty PATH every command but Bash's own is written down instead of run."""


def commands_of(block: Block, folder: Path) -> list[list[str]]:
    """The commands that a Bash block would run, as words; nothing is run."""
    record = folder / "commands"
    record.write_text("")
    done = subprocess.run(
        ["/bin/bash", "-c", RECORDER + block.text],
        cwd=folder,
        env={"PATH": "/nonexistent", "RECORD": str(record)},
        capture_output=True,
        text=True,
    )
    assert "syntax error" not in done.stderr, f"{block.place}: {done.stderr}"
    words, commands = record.read_text().split("\0")[:-1], []
    while words:
        count = int(words[0])
        commands.append(words[1 : 1 + count])
        words = words[1 + count :]
    return commands


def environment(language: str) -> dict[str, str]:
    """Of a block that is run: the commands of this environment, no network, few processes."""
    scripts = Path(sys.executable).parent
    found = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    if language == "bash":  # commands choose for themselves, and servers need several
        del found["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return found
