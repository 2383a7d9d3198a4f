"""Pages of the documentation that are generated from the code."""

import ast
import importlib
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from speculators_core.building.settings import BuildPlan
from speculators_core.cli import app
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.registry import MODELS
from speculators_core.training.settings import TrainingPlan

ROOT = Path(__file__).parents[1]
PACKAGES = ("speculators_core", "speculators_vllm", "benchmarks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs calls this once it has found the pages that are written by hand."""
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts what is generated into pages that are written by hand."""
    text = re.sub(r"<!-- docstring (\S+) -->", lambda found: docstring(found[1]), markdown)
    text = re.sub(r"<!-- documented ([A-F]) -->", lambda found: documented(found[1]), text)
    return text.replace("<!-- file table -->", file_table())


def pages() -> dict[str, str]:
    """The generated pages, by their place in the documentation."""
    commands = app()
    found = {
        f"reference/cli/{name}.md": command_page(commands, name)
        for name in commands
        if not name.startswith("-")
    }
    found["reference/configuration.md"] = configuration_page()
    return found | python_pages()


def documented(section: str) -> str:
    """What becomes of the names of one document of the public library."""
    rows = yaml.safe_load((ROOT / "tests/data/documented_api.yaml").read_text())
    table = ["| documented | here |", "|---|---|"]
    for row in (row for row in rows if row["section"] == section):
        here = "not decided" if row["state"] == "open" else "as documented"
        here = _prose(row.get("note", here))
        if row["state"] == "declined":
            here = f"**Declined.** {here} Instead: {_prose(row['instead'])}"
        table.append(f"| `{row['name']}` | {here.replace('|', chr(92) + '|')} |")
    return "\n".join(table)


# ---- commands ----


def command_page(commands: Any, name: str) -> str:
    """Synopsis, arguments and flags of a command, as ``--help`` has them."""
    text = commands[name].generate_docs(output_format="markdown", heading_level=1)
    return text.replace(f"# {name}", f"# speculators {name}", 1).replace(
        f"```console\n{name}", f"```text\nspeculators {name}", 1
    )


# ---- configuration files ----


def configuration_page() -> str:
    """Every option of the three configuration files, and of each algorithm."""
    parts = [
        "# Configuration files",
        "Three commands read YAML. All sections of `build` and `train`, and `engine`, `sync` and "
        "`run` of `generate-data`, are flags of the command too (`--engine.batch-size 8`), and "
        "flags take precedence over the file. An unknown key or a value out of bounds is an error "
        "that names the key.",
        "## `speculators generate-data --config`",
        *_sections(GenerationPlan),
        "## `speculators train --config`",
        *_sections(TrainingPlan),
        "## `speculators build --config`",
        *_sections(BuildPlan),
        "## Recipes and objectives",
        "`model.recipe` and `model.objective` of `train` and `build` take the options of the "
        "chosen algorithm.",
    ]
    for name in MODELS.names():
        model = MODELS.load(name)
        parts += [f"### `{name}`: recipe", _table(model.recipe_class)]
        parts += [f"### `{name}`: objective", _table(model.objective_class)]
    return "\n\n".join(parts) + "\n"


def _sections(plan: type[BaseModel]) -> Iterator[str]:
    for name, field in plan.model_fields.items():
        yield f"### `{name}`"
        yield from _section(name, _records(field.annotation)[0])


def _section(prefix: str, section: type[BaseModel]) -> Iterator[str]:
    yield _prose(section.__doc__)
    yield _table(section, f"{prefix}.")
    for name, field in section.model_fields.items():
        for record in _records(field.annotation):
            yield f"#### `{prefix}.{name}`"
            yield from _section(f"{prefix}.{name}", record)


def _records(annotation: Any) -> list[type[BaseModel]]:
    """Settings that a field's type holds, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for part in get_args(annotation) for record in _records(part)]


def _table(settings: type[BaseModel], prefix: str = "") -> str:
    rows = ["| option | meaning |", "|---|---|"]
    for name, field in settings.model_fields.items():
        default = "required" if field.is_required() else _default(field)
        option = f"`{prefix}{name}`<br><small>{_type(field)}; {default}</small>"
        cells = (option, _prose(field.description))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) if len(rows) > 2 else "No options."


def _prose(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split())


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "optional"
    if isinstance(value, BaseModel):
        return "see below"
    return f"default `{yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}`"


def _type(field: FieldInfo) -> str:
    bounds = (_bound(part) for part in field.metadata)
    return ", ".join([_type_name(field.annotation), *filter(None, bounds)])


def _bound(part: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {getattr(part, key)}" for key, sign in signs.items() if hasattr(part, key)]
    return " ".join(found)


def _type_name(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in parts if part is not type(None))
    if origin in (tuple, list):
        return "sections" if _records(parts[0]) else f"list of {_type_name(parts[0])}"
    if origin is not None or annotation is Any:
        return "mapping" if origin is dict else "any"
    if issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "bool": "true or false"}.get(annotation.__name__, annotation.__name__)


# ---- Python ----


def python_pages() -> dict[str, str]:
    """The public names, a page for each room of the core and one for the plug-in."""
    rooms: dict[str, list[str]] = {}
    for package in ("speculators_core", "speculators_vllm.hidden_states"):
        face = importlib.import_module(package)
        for name in face.__all__:
            place = getattr(face, name).__module__.removeprefix("speculators_core.")
            room = package if place.startswith(package) else place.split(".")[0]
            room = {"batch": "training", "errors": "format"}.get(room, room)
            rooms.setdefault(room, []).append(f"::: {package}.{name}")
    return {
        f"reference/python/{room}.md": "\n\n".join([f"# `{room}`", *blocks]) + "\n"
        for room, blocks in rooms.items()
    }


# ---- files ----


def docstring(path: str | Path) -> str:
    """A module's docstring as Markdown; what is indented in it becomes a block of its own."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    return text.replace("``", "`")


def first_line(file: Path) -> str:
    """What a module is, in its docstring's first line, without the full stop."""
    return docstring(file).partition("\n")[0].removesuffix(".")


def source_files() -> list[Path]:
    """The modules of the three packages; a package's own docstring is its face."""
    return [
        file
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
        if file.name != "__init__.py"
    ]


def file_table() -> str:
    """Every module of the repository, room by room."""
    parts, room = [], None
    for file in source_files():
        place = file.relative_to(ROOT)
        if place.parent != room:
            room = place.parent
            parts.append(f"\n### `{room}`\n\n| file | what it is |\n|---|---|")
        parts.append(f"| `{place.name}` | {re.sub(r'[|]', chr(92) + '|', first_line(file))} |")
    return "\n".join(parts)
