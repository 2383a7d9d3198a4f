"""What is done around an engine; vLLM's `LLM` is a stand-in here."""

import os
import sys
import tempfile
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ValidationError

from speculators_core.data_generation.answers.settings import AnswersConfig
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.errors import SpeculatorError
from speculators_vllm import engine_log, offline, openmp
from speculators_vllm.generation.answers import VLLMAnswerer
from speculators_vllm.generation.engine import VLLMPipeline

NAMES = (
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_CPU_KVCACHE_SPACE",
    "LD_PRELOAD",
)


class Engine:
    """Notes the environment at its start, and whether it was shut down."""

    def __init__(self, **arguments):
        if "fault" in arguments:
            raise arguments["fault"]
        self.arguments = arguments
        self.seen = {name: os.environ.get(name) for name in NAMES}
        os.environ["LD_PRELOAD"] = "of vLLM"
        self.is_shut = False
        self.llm_engine = SimpleNamespace(engine_core=self)

    def shutdown(self):
        self.is_shut = True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})


@pytest.fixture
def vllm(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "LLM", Engine, raising=False)
    monkeypatch.setattr(offline, "has_gpu", lambda: False)
    return vllm


@pytest.mark.parametrize("verbose", [False, True])
def test_data_generation_sends_what_vllm_prints_to_a_log_unless_verbose(monkeypatch, verbose):
    asked = []

    def prepare(verbose):
        asked.append(verbose)
        raise SpeculatorError("far enough")

    monkeypatch.setattr(offline, "prepare", prepare)
    plan = GenerationPlan.model_validate(
        {
            "data": {"verifier": "x", "datasets": [{"path": "x"}]},
            "sync": {"path": "x"},
            "run": {"verbose": verbose},
        }
    )
    pipeline = VLLMPipeline.__new__(VLLMPipeline)
    pipeline.plan = plan
    config = AnswersConfig.model_validate({"verifier": "x", "offline": {"verbose": verbose}})
    for start in (pipeline._arguments, lambda: VLLMAnswerer(config)):
        with pytest.raises(SpeculatorError, match="far enough"):
            start()
    assert asked == [verbose] * 2


def test_an_engine_starts_in_an_environment_that_ends_with_its_start(vllm):
    before = dict(os.environ)
    with offline.loaded(model="x") as llm:
        assert os.environ == before
        assert llm.seen == {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "LD_PRELOAD": openmp.variables().get("LD_PRELOAD"),
        }
        assert llm.arguments == {"model": "x"}
    assert llm.is_shut and os.environ == before


def test_what_the_user_has_set_wins(vllm):
    stated = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "4"}
    os.environ.update(stated)
    with offline.loaded(model="x") as llm:
        assert llm.seen.items() >= stated.items()
    assert os.environ.items() >= stated.items()


def test_an_engine_is_shut_down_where_its_user_fails(vllm):
    with pytest.raises(KeyError), offline.loaded(model="x") as llm:
        raise KeyError("of the user")
    assert llm.is_shut


def test_a_speculating_engine_reports_each_draft(vllm):
    with offline.loaded(model="x", speculative_config={"model": "y"}) as llm:
        assert llm.arguments["per_request_spec_decode_metrics"] == "detailed"


class Field(BaseModel):
    block_size: int


def fault_of_pydantic():
    with pytest.raises(ValidationError) as error:
        Field(block_size="x")
    return error.value


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (RuntimeError("no memory.\nmore"), "^vLLM did not start: no memory. Change the engine's"),
        (fault_of_pydantic(), r"^vLLM did not start: block_size: .* \(found 'x'\). Change"),
        (AssertionError(), "^vLLM did not start: AssertionError. Change"),
        (SpeculatorError("of the draft"), "^of the draft$"),
    ],
)
def test_an_engine_that_does_not_start_is_one_line_and_leaves_nothing(vllm, fault, complaint):
    before = dict(os.environ)
    with pytest.raises(SpeculatorError, match=complaint) as error, offline.loaded(fault=fault):
        pass
    assert "\n" not in str(error.value)
    assert os.environ == before


def test_an_engine_that_does_not_start_names_the_log(vllm, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_log, "_log", tmp_path / "log")
    with pytest.raises(SpeculatorError, match=rf"no memory\. .* vLLM's log: {tmp_path}/log\.$"):
        with offline.loaded(fault=RuntimeError("no memory.")):
            pass


def test_there_is_a_log_unless_vllms_output_is_wanted(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_log, "_log", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    offline.prepare()
    offline.prepare(verbose=True)
    assert not list(tmp_path.iterdir())
    offline.prepare(verbose=False)
    (log,) = tmp_path.iterdir()
    assert engine_log.log_sentence() == f" vLLM's log: {log}."


def test_without_vllm_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SpeculatorError, match=r"not installed. Install speculators-vllm\[cpu\]"):
        offline.prepare()


@pytest.mark.parametrize(
    ("plugins", "is_on"),
    [(None, True), ("speculators", True), ("a,speculators", True), ("", False), ("a", False)],
)
def test_vllm_plugins_may_leave_the_plugin_out(plugins, is_on):
    if plugins is not None:
        os.environ["VLLM_PLUGINS"] = plugins
    assert offline.has_plugin() == is_on


def test_arguments_have_vllms_names():
    given = {"max-model-len": 9, "enable_prefix_caching": False}
    named = offline.check_names("--engine-args", given, ("model",))
    assert named == {"max_model_len": 9, "enable_prefix_caching": False}
    speculative = {"num_speculative_tokens": 2}
    assert offline.check_names("--speculative-config", speculative, ()) == speculative
    for option, key, complaint in (
        ("--engine-args", "model", "--engine-args model: this command decides it. Leave it out"),
        ("--engine-args", "max_num_seq", "no such argument. Did you mean 'max_num_seqs'"),
        ("--speculative-config", "max_num_seqs", "vLLM has no such argument"),
    ):
        with pytest.raises(SpeculatorError, match=complaint):
            offline.check_names(option, {key: 1}, ("model",))


def test_the_longest_text_is_the_smallest_bound():
    config = SimpleNamespace(
        get_text_config=lambda: SimpleNamespace(max_position_embeddings=100),
    )
    assert offline.longest_text(config) == 100
    assert offline.longest_text(config, {}, {"max_model_len": 30}, {"max_model_len": 50}) == 30
    assert offline.longest_text(config, {"max_model_len": 200}) == 100
    unbounded = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    assert offline.longest_text(unbounded) == sys.maxsize
    with pytest.raises(SpeculatorError, match="max_model_len: found '30', expected a number"):
        offline.longest_text(config, {"max_model_len": "30"})


def test_preparing_changes_no_variable():
    before = dict(os.environ)
    offline.prepare()
    assert os.environ == before
