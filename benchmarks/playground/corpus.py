"""The playground's texts: the standard library's source.

It is used as files and as chats. A twentieth of the files, chosen by the hash of their path, is
held out: training documents come from the other files, prompts from these alone.
"""

import ast
import hashlib
import json
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from speculators_core.files import write_text

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data"}
"""Folders that are not source of the library itself, or are tables of data."""
MAX_FILE_CHARS = 150_000
MAX_FUNCTION_CHARS = 2_500
HELD_OUT_SHARE = 20
PROMPTS_PER_CATEGORY = 12


class SourceFile(BaseModel):
    """One file of the standard library."""

    model_config = ConfigDict(frozen=True)
    path: str
    text: str

    @property
    def is_held_out(self) -> bool:
        return int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


class Function(BaseModel):
    """A documented function, and where in its file it starts."""

    model_config = ConfigDict(frozen=True)
    name: str
    request: str
    source: str
    line: int


def read_library() -> list[SourceFile]:
    """Every source file of this interpreter's standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if 0 < len(text) <= MAX_FILE_CHARS:
            files.append(SourceFile(path=relative.as_posix(), text=text))
    return files


def functions(file: SourceFile) -> Iterator[Function]:
    """The documented functions and methods of a file, each with the request that asks for it."""
    try:
        tree = ast.parse(file.text)
    except SyntaxError:
        return
    lines = file.text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        doc = ast.get_docstring(node)
        source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        if not doc or len(source) > MAX_FUNCTION_CHARS:
            continue
        arguments = ", ".join(argument.arg for argument in node.args.args)
        request = f"Write `{node.name}({arguments})`. {doc.strip().splitlines()[0]}"
        yield Function(name=node.name, request=request, source=source, line=node.lineno)


def conversation(function: Function) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": function.request},
        {"role": "assistant", "content": function.source.rstrip()},
    ]


def prompts(files: list[SourceFile]) -> list[dict]:
    """Twelve prompts for each of four categories, from held-out files alone.

    ``class``: a file up to and with a class header and its docstring; ``function``: up to and with
    a function's signature and docstring; ``body``: up to the middle of a function; ``chat``: a
    request for a function.
    """
    held_out = [file for file in files if file.is_held_out and len(file.text) > 2_000]
    chosen: dict[str, list[dict]] = {"class": [], "function": [], "body": [], "chat": []}
    for file in held_out:
        lines = file.text.splitlines(keepends=True)
        for category, candidate in _candidates(file, lines):
            taken = [p for p in chosen[category] if p["source"] == file.path]
            if len(taken) < 2 and len(chosen[category]) < PROMPTS_PER_CATEGORY:
                chosen[category].append({"category": category, **candidate, "source": file.path})
    return [prompt for category in chosen.values() for prompt in category]


def write_lines(rows: Iterable[dict], path: Path) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _candidates(file: SourceFile, lines: list[str]) -> Iterator[tuple[str, dict]]:
    # A line break takes the indent after it, so a prompt ends before one.
    for node in ast.walk(ast.parse(file.text)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or not ast.get_docstring(node):
            continue
        header_end = node.body[0].end_lineno or node.lineno
        if header_end - node.lineno > 15 or len(node.body) < 3 or node.lineno < 20:
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        half_way = node.body[len(node.body) // 2].end_lineno or header_end
        ends = {kind: header_end} if kind == "class" else {kind: header_end, "body": half_way}
        for category, end in ends.items():
            context = "".join(lines[max(0, node.lineno - 21) : end]).rstrip()
            if len(context) < 1_800:
                yield category, {"prompt": context}
    for function in functions(file):
        if function.source.count("\n") >= 6:
            yield "chat", {"messages": conversation(function)[:1]}


def write_chats(path: Path, count: int = 200) -> None:
    """Requests for functions with their sources, of files that no prompt is from, a line each."""
    chats = (
        {"messages": conversation(function)}
        for file in read_library()
        if not file.is_held_out
        for function in functions(file)
    )
    write_lines(islice(chats, count), path)


if __name__ == "__main__":
    from speculators_core.cli import run_function

    run_function(write_chats)
