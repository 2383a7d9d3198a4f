import asyncio
import importlib
import logging
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest

from benchmarks import playground
from speculators_vllm import openmp
from speculators_vllm.hidden_states import CONNECTOR_MODULE
from speculators_vllm.plugin import patches
from speculators_vllm.plugin import register as plugin


@pytest.fixture
def warnings(caplog):
    importlib.import_module("vllm.engine.arg_utils")  # gives warnings of its own
    patches.warn_of_untested_version.cache_clear()  # as in a fresh process
    caplog.set_level(logging.WARNING, logger="speculators_vllm")
    logging.getLogger("speculators_vllm").propagate = True
    return caplog


def test_vllm_finds_the_plugin():
    (point,) = entry_points(group="vllm.general_plugins", name="speculators")
    assert point.load() is plugin.register


def test_default_proposal_decides_when_the_speculator_is_served_by_name(tmp_path):
    import json
    import shutil

    from vllm.engine.arg_utils import EngineArgs

    folder = shutil.copytree(playground.EAGLE3, tmp_path / "eagle3")
    config = json.loads((folder / "config.json").read_text())
    inner = config["speculators_config"]
    inner["proposal_methods"].append({"proposal_type": "sampling", "speculative_tokens": 6})
    inner["default_proposal_method"] = "sampling"
    inner["verifier"]["name_or_path"] = str(playground.VERIFIER)
    (folder / "config.json").write_text(json.dumps(config))
    served = EngineArgs(model=str(folder), dtype="float32").create_engine_config()
    assert served.speculative_config.num_speculative_tokens == 6
    chosen = EngineArgs(
        model=str(folder), dtype="float32", speculative_config={"num_speculative_tokens": 2}
    ).create_engine_config()
    assert chosen.speculative_config.num_speculative_tokens == 2


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
    code = (
        "import sys, speculators_vllm.plugin.register\n"
        "heavy = {'torch', 'transformers', 'vllm', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registration_imports_none_of_our_networks():
    code = (
        "import sys, vllm.engine.arg_utils, speculators_vllm.plugin.register as plugin\n"
        "before = set(sys.modules)\n"
        "plugin.register()\n"
        "new = {n for n in set(sys.modules) - before if n.startswith('speculators')}\n"
        "heavy = ('speculators_vllm.plugin.networks', 'speculators_core.format.config', "
        "'speculators_core.models.speculator')\n"
        "assert not new.intersection(heavy), new\n"
        "assert 'datasets' not in sys.modules and 'numba' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_registration_is_idle_where_vllm_builds_nothing():
    code = (
        "import sys, vllm, speculators_vllm.plugin.register as plugin\n"
        "plugin.register()\n"
        "assert 'vllm.model_executor.models.registry' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_fault_of_ours_never_stops_vllm(warnings, monkeypatch):
    def fail():
        raise RuntimeError("broken")

    monkeypatch.setattr(patches, "apply", fail)
    plugin.register()
    assert "not active" in warnings.text and "broken" in warnings.text


def test_patch_steps_aside_where_the_signature_is_another(warnings):
    class Theirs:
        def method(self, renamed):
            return renamed

    original = Theirs.method
    patches._wrap(Theirs, "method", ["self", "known"], lambda f: None)
    patches._wrap(Theirs, "gone", ["self"], lambda f: None)
    assert Theirs.method is original
    assert "['self', 'renamed'], expected ['self', 'known']" in warnings.text
    assert "are None" in warnings.text


@pytest.mark.parametrize(("version", "warned"), [((0, 31), 1), ((0, 32), 0), ((0, 34), 1)])
def test_untested_version_gets_one_warning(warnings, monkeypatch, version, warned):
    monkeypatch.setattr("vllm.version.__version_tuple__", (*version, 0))
    patches.warn_of_untested_version()
    assert len(warnings.messages) == warned


def test_speculator_alone_finds_its_verifier_beside_it(monkeypatch, tmp_path):
    """What `vllm serve <speculator>` does, up to the engine's config."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.chdir(tmp_path)
    config = EngineArgs(model=str(playground.EAGLE3), dtype="float32").create_engine_config()
    assert config.model_config.model == str(playground.VERIFIER)
    assert config.model_config.tokenizer == str(playground.VERIFIER)
    assert config.speculative_config.method == "eagle3"
    assert config.speculative_config.num_speculative_tokens == 3


@pytest.mark.skipif(openmp.library() is None, reason="vLLM for a GPU brings no libiomp5")
def test_openmp_library_is_under_torch_and_named_for_children(monkeypatch):
    code = (
        "import os\n"
        "from speculators_vllm import openmp\n"
        "assert openmp.preload()\n"
        "assert openmp.LIBRARY in os.environ['LD_PRELOAD']\n"
        "import torch\n"
        "assert 'libiomp5' in open('/proc/self/maps').read()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    openmp.preload_in_children()
    import os

    assert os.environ["LD_PRELOAD"] == f"{openmp.library()}:other.so"
    openmp.preload_in_children()
    assert os.environ["LD_PRELOAD"].count(openmp.LIBRARY) == 1


def test_signature_may_go_on_behind_the_dots(warnings):
    class Theirs:
        def method(self, known, more=1):
            return known

    patches._wrap(Theirs, "method", ["self", "known", "..."], lambda original: lambda *_: "ours")
    assert Theirs().method(1) == "ours"
    patches._wrap(Theirs, "__repr__", ["self", "known", "..."], lambda original: None)
    assert "expected ['self', 'known', '...']" in warnings.text


def test_classmethods_are_wrapped_bound():
    class Theirs:
        @classmethod
        def method(cls):
            return cls.__name__

    patches._wrap(Theirs, "method", [], lambda original: lambda: f"our {original()}")
    patches._wrap(Theirs, "method", [], lambda original: lambda: "twice")
    assert Theirs.method() == "our Theirs"


@pytest.mark.parametrize(
    ("module", "options", "refused"),
    [
        (CONNECTOR_MODULE, {"hidden_states": "all"}, False),
        (CONNECTOR_MODULE, {"hidden_state": "all"}, True),
        (CONNECTOR_MODULE, {"name": "../out"}, True),
        ("another.connector", {"hidden_state": "all"}, False),
    ],
)
def test_server_refuses_a_malformed_request_alone(tmp_path, module, options, refused):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    class Server:
        """What the wrapper needs of vLLM's AsyncLLM."""

        vllm_config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(
                kv_connector_module_path=module,
                kv_connector_extra_config={"kind": "files", "folder": str(tmp_path)},
            )
        )

        async def add_request(self, request_id, prompt, params, priority=0):
            return request_id, priority

    patches._wrap(
        Server, "add_request", ["self", "request_id", "prompt", "params", "..."], patches._checking
    )
    parameters = SamplingParams(extra_args={"kv_transfer_params": options})
    asked = Server().add_request("one", "text", parameters, priority=2)
    if refused:
        with pytest.raises(VLLMValidationError, match="kv_transfer_params: "):
            asyncio.run(asked)
    else:
        assert asyncio.run(asked) == ("one", 2)
