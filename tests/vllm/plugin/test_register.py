"""Registration: what it changes in vLLM, and what it leaves alone."""

import importlib
import logging
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from speculators_vllm.plugin import patches
from speculators_vllm.plugin import register as plugin


@pytest.fixture
def warnings(caplog):
    importlib.import_module("vllm.engine.arg_utils")  # gives warnings of its own

    patches.warn_of_untested_version.cache_clear()  # as in a fresh process
    caplog.set_level(logging.WARNING, logger="speculators_vllm")
    logging.getLogger("speculators_vllm").propagate = True
    return caplog


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_vllm_finds_the_plugin():
    (point,) = entry_points(group="vllm.general_plugins", name="speculators")
    assert point.load() is plugin.register


def test_second_registration_changes_nothing(warnings):
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    once = EngineArgs.create_speculative_config
    plugin.register()
    assert EngineArgs.create_speculative_config is once
    assert hasattr(once, patches.MARK)
    assert not warnings.messages


def test_second_registration_repeats_no_warning_of_the_version(warnings, monkeypatch):
    monkeypatch.setattr("vllm.version.__version_tuple__", (0, 34, 0))
    plugin.register()
    plugin.register()
    (message,) = warnings.messages
    assert "found 0.34" in message


def test_importing_the_plugin_imports_nothing_heavy():
    run(
        "import sys, speculators_vllm.plugin.register\n"
        "heavy = {'torch', 'transformers', 'vllm', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_registration_imports_nothing_where_vllm_is_not_imported():
    run(
        "import sys, speculators_vllm.plugin.register as plugin\n"
        "plugin.register()\n"
        "heavy = {'torch', 'transformers', 'vllm', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_registration_imports_none_of_our_networks():
    run(
        "import sys, vllm.engine.arg_utils, speculators_vllm.plugin.register as plugin\n"
        "before = set(sys.modules)\n"
        "plugin.register()\n"
        "new = {n for n in set(sys.modules) - before if n.startswith('speculators')}\n"
        "heavy = ('speculators_vllm.plugin.networks', 'speculators_core.format.config', "
        "'speculators_core.models.speculator')\n"
        "assert not new.intersection(heavy), new\n"
        "assert 'datasets' not in sys.modules and 'numba' not in sys.modules"
    )


def test_registration_is_idle_where_vllm_builds_nothing():
    run(
        "import sys, vllm, speculators_vllm.plugin.register as plugin\n"
        "plugin.register()\n"
        "assert 'vllm.model_executor.models.registry' not in sys.modules"
    )


def test_a_fault_of_ours_never_stops_vllm(warnings, monkeypatch):
    def fail():
        raise RuntimeError("broken")

    monkeypatch.setattr(patches, "apply", fail)
    plugin.register()
    assert "not active" in warnings.text and "broken" in warnings.text


@pytest.mark.parametrize(("version", "warned"), [((0, 31), 1), ((0, 32), 0), ((0, 34), 1)])
def test_untested_version_gets_one_warning(warnings, version, warned):
    patches.warn_of_untested_version((*version, 0))
    patches.warn_of_untested_version((*version, 0))
    assert len(warnings.messages) == warned
