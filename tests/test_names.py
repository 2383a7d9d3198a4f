"""Every name that a module reads is defined in it: the linters leave that to this test.

Their rules are off, because jaxtyping writes the axes of tensors as strings in annotations.
"""

import builtins
import symtable
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OF_MODULES = {*dir(builtins), "__file__", "__name__", "__doc__", "__path__", "__spec__"}


def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from tables(child)


def undefined_names(source: str, name: str) -> set[str]:
    module = symtable.symtable(source, name, "exec")
    defined = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    defined |= {child.get_name() for child in module.get_children()}
    read = {
        symbol.get_name()
        for table in tables(module)
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or table is module)
    }
    return read - defined - OF_MODULES


@pytest.mark.parametrize("folder", ["speculators_core", "speculators_vllm", "benchmarks", "docs"])
def test_names_are_defined(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    found = {file: undefined_names(file.read_text("utf-8"), file.name) for file in files}
    assert not {file: names for file, names in found.items() if names}


def test_an_import_that_is_missing_is_found():
    assert undefined_names("def f(x: 'axis') -> int:\n    return render(x)\n", "a.py") == {"render"}
