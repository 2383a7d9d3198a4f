"""Roots hold against every way out that a file system has."""

from pathlib import Path

import pytest

from speculators_core.errors import SpeculatorError
from speculators_core.files import Roots


@pytest.fixture
def inside(tmp_path) -> Path:
    """A root with links in and out of it; beside it lies what must not be reached."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    (root / "data").mkdir(parents=True)
    secret.mkdir()
    (secret / "key").write_text("key")
    (root / "data" / "rows").write_text("rows")
    (root / "out").symlink_to(secret)
    (root / "again").symlink_to(root / "out")
    (root / "key").symlink_to(secret / "key")
    (root / "in").symlink_to("data")
    (root / "loop").symlink_to("loop")
    (tmp_path / "root-too").mkdir()
    (tmp_path / "entry").symlink_to(root)
    return root


@pytest.mark.parametrize(
    "path, found",
    [
        ("root", "root"),
        ("root/data/rows", "root/data/rows"),
        ("root/in/rows", "root/data/rows"),
        ("entry/data", "root/data"),
        ("root/new/store", "root/new/store"),
        ("root/data/../new", "root/new"),
        ("secret/../root/data", "root/data"),
    ],
)
def test_what_lies_below_a_root_is_given_in_full(path, found, inside):
    base = inside.parent
    for roots in (Roots((inside,)), Roots((base / "nowhere", base / "entry"))):
        assert roots.check(base / path) == (base / found).resolve()


@pytest.mark.parametrize(
    "path",
    [
        "",
        "secret/key",
        "root/../secret/key",
        "root/out/key",
        "root/out",
        "root/again/key",
        "root/key",
        "root/out/new",
        "root/in/../../secret",
        "root/new/../../secret",
        "root-too",
        "root/out/../data",
    ],
)
def test_what_lies_outside_is_refused_by_its_full_name(path, inside):
    with pytest.raises(SpeculatorError, match="outside the allowed.*allowed_roots") as error:
        Roots((inside,)).check(inside.parent / path)
    assert str(inside) in str(error.value)


def test_relative_paths_and_homes_are_meant_as_usual(inside, monkeypatch):
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(inside))
    roots = Roots((Path("."),))
    assert roots.check("data") == roots.check("~/data") == inside / "data"
    with pytest.raises(SpeculatorError, match="in full"):
        roots.check("../secret")


@pytest.mark.parametrize("path", ["root/loop/key", "root/\0"])
def test_what_is_no_path_is_refused(path, inside):
    with pytest.raises(SpeculatorError, match="not a usable path|is outside"):
        Roots((inside / "data",)).check(str(inside.parent / path))


def test_without_roots_nothing_is_allowed(inside):
    with pytest.raises(SpeculatorError, match="none"):
        Roots(()).check(inside)


def test_the_error_names_the_option_that_the_command_has(inside):
    with pytest.raises(SpeculatorError, match="Add its folder to --allowed-roots."):
        Roots((), "--allowed-roots").check(inside)


def test_what_the_user_names_is_a_root_itself(inside):
    roots = Roots(()).with_own(inside / "data" / "rows")
    assert roots.check(inside / "in" / "rows") == inside / "data" / "rows"
    with pytest.raises(SpeculatorError, match="outside the allowed folders"):
        roots.check(inside / "data" / "others")
