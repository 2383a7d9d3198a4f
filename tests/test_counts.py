"""Figures of the code that may only get better."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_ANY = {"speculators_core": 27, "speculators_vllm": 50, "benchmarks": 27}
"""`Any` in annotations, per 1,000 lines of code."""
MOST_IMPORTS = 251
"""Imports inside functions of all three packages, those of commands left out."""
MOST_IMPORTS_WITHOUT_REASON = 251


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


def imports_in_functions(file: Path) -> Iterator[tuple[int, bool]]:
    """Line of each import inside a function, and whether a comment gives its reason.

    The comment stands at the end of the line or above a block of imports.
    """
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    yield (
                        node.lineno,
                        "#" in lines[node.lineno - 1] or "#" in lines[node.lineno - 2],
                    )
