"""Figures of the code that may only get better."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_ANY = {"speculators_core": 8.0, "speculators_vllm": 3.0, "benchmarks": 1.3}
"""`Any` per 1,000 lines of code, imports of the name itself left out."""
MOST_IMPORTS = {"speculators_core": 3, "speculators_vllm": 20, "benchmarks": 6}
"""Imports inside functions. Those of commands are not counted: their room's docstring says why."""
MOST_WITHOUT_REASON = {"speculators_core": 0, "speculators_vllm": 0, "benchmarks": 0}
"""Those of them that have no comment, at the end of their line or on the line before."""


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def lines_of_code(file: Path) -> int:
    """Lines that hold something else than a comment or a docstring."""
    text = file.read_text(encoding="utf-8")
    skipped = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    )
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def count_any(file: Path) -> int:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def imports_in_functions(package: str) -> list[bool]:
    """Of each import inside a function, whether a comment gives its reason."""
    found = []
    for file in files(package):
        if "commands" in file.parts:
            continue
        text = file.read_text(encoding="utf-8")
        lines = ["", *text.splitlines()]
        numbers = {
            node.lineno
            for function in ast.walk(ast.parse(text))
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        found += [any("#" in line for line in lines[n - 1 : n + 1]) for n in numbers]
    return found


@pytest.mark.parametrize("package", MOST_ANY)
def test_types_are_named(package):
    code = sum(map(lines_of_code, files(package)))
    rate = 1000 * sum(map(count_any, files(package))) / code
    assert rate <= MOST_ANY[package]


@pytest.mark.parametrize("package", MOST_IMPORTS)
def test_modules_import_at_their_top_or_say_why_not(package):
    have_reason = imports_in_functions(package)
    assert len(have_reason) <= MOST_IMPORTS[package]
    assert have_reason.count(False) <= MOST_WITHOUT_REASON[package]
