"""Every code block of the documentation is right, and runs on the playground."""

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from docs.generated import ROOT
from speculators_core.building.settings import BuildPlan
from speculators_core.cli import app
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.settings import load_yaml
from speculators_core.training.settings import TrainingPlan
from tests.docs.blocks import (
    RUN,
    SHOWN,
    Block,
    blocks_of,
    commands_of,
    environment,
    pages_in_order,
)

BLOCKS = [block for page in pages_in_order() for block in blocks_of(page)]
PAGES = list(dict.fromkeys(b.page for b in BLOCKS if b.language in RUN and not b.not_run))
QUICK = ("docs/install.md", "docs/how-to/decode-on-transformers.md", "docs/how-to/publish.md")
"""Pages whose blocks every `make test` runs; `make test-docs` runs all."""
MODULES = ("speculators_core", "speculators_vllm", "benchmarks")


def of(language: str) -> Any:
    chosen = [block for block in BLOCKS if block.language == language]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.place)


def test_every_block_has_a_language():
    for block in BLOCKS:
        assert block.language in RUN + SHOWN, block.place


@of("python")
def test_python_compiles_and_what_it_imports_exists(block: Block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(MODULES):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.place}: {node.module}.{alias.name}"


@of("yaml")
def test_a_configuration_fits_its_plan(block: Block):
    content = load_yaml(block.text)
    plan = TrainingPlan if "model" in content else GenerationPlan
    if "prompts" in content:
        plan = BuildPlan
    plan.model_validate(content)
    if block.title and (ROOT / block.title).exists():
        assert content == load_yaml((ROOT / block.title).read_text()), block.place


@of("bash")
def test_commands_are_understood(block: Block, tmp_path):
    for command in commands_of(block, tmp_path):
        understand(command, block)


def understand(command: list[str], block: Block) -> None:
    """Fails where the program that would be run does not know these words."""
    program, *rest = command
    if program == "torchrun":
        program, *rest = ["python", *rest[rest.index("-m") :]]
    if program in ("python", "python3") and rest[0] == "-m":
        module, rest = rest[1], rest[2:]
        if module == "speculators_core":
            program = "speculators"
        else:
            assert importlib.util.find_spec(module), f"{block.place}: no module {module}"
            return
    if program in ("speculators", "speculators-vllm"):
        app().parse_args(rest, exit_on_error=False, print_error=False)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"{block.place}: {command}"
    elif program == "vllm":
        for word in rest:
            if word.startswith("{"):
                json.loads(word)
    elif program == "python":
        assert rest[0] == "-c", block.place
        ast.parse(rest[1])
    else:
        assert program in ("pip", "pytest", "curl", "head", "cat", "seq", "sleep"), block.place


# ---- run ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """What all pages share: the playground, and what the pages before left behind."""
    shared = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "benchmarks", shared / "benchmarks")
    yield shared
    for file in shared.glob("*.pid"):
        with suppress(ValueError, ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def marked(page: str) -> Any:
    return page if page in QUICK else pytest.param(page, marks=pytest.mark.docs)


@pytest.mark.parametrize("page", map(marked, PAGES))
def test_the_blocks_of_a_page_run(page, folder):
    for block in blocks_of(page):
        if block.language in RUN and not block.not_run:
            run(block, folder)


def run(block: Block, folder: Path) -> None:
    """Writes a block that has a title to its file; runs Bash and Python."""
    if block.title:
        file = folder / block.title
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.small_text)
    if block.language == "yaml":
        assert block.title, f"{block.place}: a configuration needs a title, or a reason"
        return
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable]
    script = folder / "block.py"
    script.write_text(block.small_text)
    last = block.small_text if block.language == "bash" else str(script)
    done = subprocess.run(
        [*program, last],
        cwd=folder,
        env=environment(block.language),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{block.place}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
