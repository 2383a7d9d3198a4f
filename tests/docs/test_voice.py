"""Turns of phrase that the project does not use, in documentation, docstrings and errors."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.generated import ROOT, source_files

PATTERNS = {
    r"(?<![Tt]here )\b(?:is|are) no (?!longer|more|worse|better|larger|smaller|need)\w+": (
        "is not a"
    ),
    r"\b(?:go|goes|going|gone|went) on\b": "resume, continue",
    r"(?<!fall )(?<!falls )(?<!fallen )(?<!falling )\bbehind\b": "after",
    r"\b(?:hold|holds|held|holding)(?: \S+){1,5} against\b": "validate against",
    r"\b[Mm]end(?:s|ed|ing)?\b": "fix, repair, work around",
    r"\bstands? before\b|\bas (?:it|they) stands?\b": "the text before, as is",
    r"\b(?:file|config|checkpoint|folder|field|key|header|report|server|store|flag|plan) "
    r"(?:tells|says|said|told)\b": "reports, states",
    r"\bthe verifier's own\b|\bof (?:ours|its own|their own)\b": "leave it out",
    r"\bdealt with\b": "is acknowledged",
    r"\bWhoever\b|\bWhat a draft\b": "subject, verb, object",
    r"\bbell\b|\bgoodbye\b|\b[Cc]ulprit|\bSettlement\b|\bSieve\b|\bParcel\b": "the plain noun",
    r"\btakes? no notice\b|\bwithout a word\b": "ignores; silently",
}
BARE_PREPOSITION = re.compile(r"(?:Of|At|By|For|From|In|To|With) ")
PROSE_FILES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def faults(text: str) -> list[str]:
    """Banned phrases of a text, each with what to write instead."""
    joined = " ".join(text.split())
    return [
        f"{found[0]!r}: {instead}"
        for pattern, instead in PATTERNS.items()
        for found in re.finditer(pattern, joined)
    ]


def prose_of(markdown: str) -> str:
    """A page without its code."""
    return re.sub(r"^( *)```.*?^\1```|`[^`\n]+`", "", markdown, flags=re.MULTILINE | re.DOTALL)


def texts_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Docstrings of modules, classes, functions and fields, and the words of raised errors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.lineno, node.value.value
        elif isinstance(node, ast.Raise) and node.exc is not None:
            parts = [
                part.value
                for part in ast.walk(node.exc)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            yield node.lineno, " ".join(parts)


def field_docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What stands under the fields of settings: their ``--help``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                    and isinstance(text.value.value, str)
                ):
                    yield text.lineno, text.value.value


@pytest.mark.parametrize("file", PROSE_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_documentation_is_plain(file):
    assert not faults(prose_of(file.read_text()))


def rough(file: Path) -> list[str]:
    """Where the docstrings and errors of a file use a banned phrase."""
    tree = ast.parse(file.read_text())
    found = [f"{line}: {fault}" for line, text in texts_of(tree) for fault in faults(text)]
    return found + [
        f"{line}: {text!r}: name the thing"
        for line, text in field_docstrings(tree)
        if BARE_PREPOSITION.match(text)
    ]


def test_docstrings_and_errors_are_plain():
    found = {file.relative_to(ROOT).as_posix(): rough(file) for file in source_files()}
    assert not {name: lines for name, lines in found.items() if lines}
