"""The list of patches fits the installed vLLM, and a patch that does not fit is skipped."""

import inspect
import logging
import sys
from pkgutil import resolve_name
from types import ModuleType

import pytest

from speculators_vllm import offline
from speculators_vllm.plugin import patches
from speculators_vllm.plugin.patches import Patch


@pytest.fixture
def warnings(caplog, monkeypatch):
    caplog.set_level(logging.WARNING, logger="speculators_vllm")
    monkeypatch.setattr(logging.getLogger("speculators_vllm"), "propagate", True)
    return caplog


@pytest.fixture
def theirs(monkeypatch):
    """A module with a class to patch, and with a wrapper."""
    module = ModuleType("theirs")

    class Theirs:
        def method(self, known, more=1):
            """Theirs."""
            return known + more

        @classmethod
        def of_class(cls):
            return cls.__name__

    module.Theirs = Theirs
    module.wrapper = lambda original: lambda *given: f"ours of {original(*given)}"
    monkeypatch.setitem(sys.modules, "theirs", module)
    return module


def patch_of(name, *parameters, owner="theirs:Theirs"):
    return Patch(owner, name, parameters, "theirs:wrapper")


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.name)
def test_every_patch_fits_the_installed_vllm(patch):
    if patch in (*patches.FOR_CPU_WORKERS, *patches.FOR_CPU_SAMPLING) and offline.has_gpu():
        pytest.skip("of vLLM for CPUs")
    function = inspect.unwrap(getattr(resolve_name(patch.owner), patch.name))
    expected = [name for name in patch.parameters if name != "..."]
    found = list(inspect.signature(function).parameters)
    if inspect.ismethod(getattr(resolve_name(patch.owner), patch.name)):
        found = found[len(found) - len(expected) :]  # without the class
    assert found[: len(expected)] == expected
    assert len(found) == len(expected) or "..." in patch.parameters
    assert callable(resolve_name(patch.wrapper))


def test_a_patch_is_applied_once(theirs):
    patch = patch_of("method", "self", "known", "more")
    assert patch.apply() and patch.apply()
    assert theirs.Theirs().method(1) == "ours of 2"
    assert theirs.Theirs.method.__doc__ == "Theirs."


@pytest.mark.parametrize(
    ("parameters", "fits"),
    [
        (("self", "known", "more"), True),
        (("self", "known", "..."), True),
        (("self", "..."), True),
        (("self", "known"), False),
        (("self", "more", "known"), False),
        (("self", "renamed", "..."), False),
        (("self", "known", "more", "new", "..."), False),
        ((), False),
    ],
)
def test_another_signature_is_left_alone_with_a_warning(theirs, warnings, parameters, fits):
    original = theirs.Theirs.method
    assert patch_of("method", *parameters).apply() == fits
    assert (theirs.Theirs.method is original) == (not fits)
    assert len(warnings.messages) == (not fits)
    if not fits:
        assert f"('self', 'known', 'more'), expected {parameters}" in warnings.text


@pytest.mark.parametrize(
    ("owner", "name", "reason"),
    [
        ("theirs:Theirs", "gone", "did not patch vLLM's theirs:Theirs.gone: it does not exist"),
        ("theirs:Gone", "method", "no attribute 'Gone'"),
        ("theirs.gone:Theirs", "method", "'theirs' is not a package"),
    ],
)
def test_what_has_moved_is_left_alone_with_a_warning(theirs, warnings, owner, name, reason):
    assert not patch_of(name, "self", owner=owner).apply()
    assert reason in warnings.text


def test_classmethods_are_wrapped_bound(theirs):
    patch = patch_of("of_class")
    assert patch.apply() and patch.apply()
    assert theirs.Theirs.of_class() == "ours of Theirs"
