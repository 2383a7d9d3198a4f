"""The documentation builds without a network, and generated pages are complete."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from docs.generated import ROOT, file_table, first_line, pages, source_files
from speculators_core.errors import Cause
from speculators_core.registry import COMMANDS, MODELS


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_no_page_loads_anything_from_another_host(site):
    loaded = re.compile(
        r"<(?:script|img|iframe|source|use)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
        r"|<link\b[^>]*rel=[\"']?(?:stylesheet|preconnect|preload|icon)[^>]*href=[\"']?"
        r"(?:https?:)?//[^>]*>"
    )
    for page in site.rglob("*.html"):
        assert not loaded.findall(page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)|@import", style.read_text()), style


def test_every_command_and_algorithm_has_its_reference():
    generated = pages()
    for name in COMMANDS.names():
        assert f"speculators {name}" in generated[f"reference/cli/{name}.md"]
    for name in MODELS.names():
        assert f"### `{name}`: objective" in generated["reference/configuration.md"]


def test_every_file_is_described_in_under_ten_words():
    table = file_table()
    for file in source_files():
        place = file.relative_to(ROOT)
        purpose = first_line(file)
        assert f"| `{place.name}` | " in table
        assert purpose, f"{place} has no docstring"
        assert len(purpose.split()) < 10, f"{place}: {purpose}"


def test_every_cause_of_check_has_its_diagnosis():
    page = (ROOT / "docs/reference/diagnoses.md").read_text()
    for cause in get_args(Cause):
        section = page.partition(f"\n## {cause}\n")[2].partition("\n## ")[0]
        for part in ("**Symptom.**", "**Example.**", "**Remedy.**"):
            assert part in section, f"{cause}: {part}"
