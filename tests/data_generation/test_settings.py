import datetime

import pytest
import yaml

from speculators_core.data_generation.settings import (
    DataGenConfig,
    EngineConfig,
    GenerationPlan,
    RunConfig,
    StatesConfig,
    SyncConfig,
    read_plan,
)
from speculators_core.errors import SpeculatorError
from speculators_core.settings import load_yaml

WHOLE = """
data:
  verifier: Qwen/Qwen3-8B
  datasets:
    - {path: chats.jsonl, limit: 5, columns: {messages: turns}}
engine: {batch_size: 4, dtype: bfloat16}
sync: {path: states}
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "plan.yaml"
        path.write_text(text)
        return path

    return write


def test_a_file_is_a_plan(file):
    plan = read_plan(file(WHOLE))
    assert plan.data.datasets[0].columns.messages == "turns"
    assert plan.engine.batch_size == 4 and plan.engine.max_length == EngineConfig().max_length
    assert plan.run == RunConfig()


def test_flags_win_over_the_file_and_leave_what_they_do_not_name(file):
    flags = {"engine": EngineConfig(batch_size=9), "sync": None, "run": RunConfig(workers=2)}
    plan = read_plan(file(WHOLE), flags)
    assert plan.engine.batch_size == 9 and plan.engine.dtype == "bfloat16"
    assert plan.run.workers == 2 and str(plan.sync.path) == "states"


@pytest.mark.parametrize(
    ("text", "where"),
    [("engine: 5", "engine: found 5"), ("data: {states: [x]}", r"data.states: found .'x'.")],
)
def test_flags_do_not_hide_a_section_that_is_none(file, text, where):
    flags = {
        "engine": EngineConfig(batch_size=9),
        "data": DataGenConfig.model_construct(
            states=StatesConfig(last=True), _fields_set={"states"}
        ),
    }
    with pytest.raises(SpeculatorError, match=f"plan.yaml: {where}, expected a mapping"):
        read_plan(file(text), flags)


def test_a_flag_at_its_default_wins_too(file):
    plan = read_plan(file(WHOLE), {"engine": EngineConfig(batch_size=None)})
    assert plan.engine.batch_size is None


def test_the_key_of_a_server_is_never_written(file):
    plan = read_plan(file(WHOLE), {"engine": EngineConfig(api_key="secret")})
    assert plan.engine.api_key == "secret"
    assert "secret" not in plan.model_dump_json()


REFUSED = {
    "no file": (None, "nowhere.yaml cannot be read: .*No such file"),
    "no yaml": ("data: [", "is not valid YAML"),
    "no sections": ("- 1", "holds a list; expected the sections data, engine, sync, run"),
    "section": (WHOLE + "egnine: {}", "unknown section 'egnine'.*Did you mean 'engine'"),
    "option": (WHOLE + "run: {wokers: 2}", "unknown option run.wokers. Did you mean 'workers'"),
    "a section's name": (
        WHOLE.replace("batch_size: 4", "engine: vllm"),
        "unknown option engine.engine. Did you mean 'name'",
    ),
    "option in a list": (
        WHOLE.replace("messages: turns", "mesages: turns"),
        "unknown option data.datasets.0.columns.mesages. Did you mean 'messages'",
    ),
    "option like no other": (
        WHOLE + "run: {x: 2}",
        "unknown option run.x. Expected one of workers, backend, ",
    ),
    "bound": (WHOLE + "run: {workers: 0}", "run.workers: .*greater than or equal to 1"),
    "choice": (WHOLE.replace("bfloat16", "int4"), "engine.dtype: .*'float32'"),
    "no verifier": ("data: {datasets: [{path: x}]}", "data.verifier is missing: Folder or hub id"),
    "no data set": (WHOLE.replace("- {path: chats.jsonl", "- {name: x"), "datasets.0.path"),
    "no data sets": ("data: {verifier: v, datasets: []}\nsync: {path: x}", "data.datasets"),
    "no folder": (WHOLE.replace("sync: {path: states}", ""), "sync.path is missing"),
    "no consumer": (WHOLE.replace("path: states", "kind: zmq"), "sync.urls is missing"),
    "url": (WHOLE.replace("path: states", "kind: zmq, urls: ['http://x']"), "sync.urls.0"),
    "nothing kept": (
        WHOLE.replace("data:", "data:\n  states: {layer_ids: [], last: false}"),
        "keeps nothing",
    ),
    "no date": ("data: 2001-99-99", "is not valid YAML"),
    "python": ("data: !!python/object/apply:os.getcwd []", "is not valid YAML"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_mistake_is_one_line(file, tmp_path, what):
    text, words = REFUSED[what]
    path = tmp_path / "nowhere.yaml" if text is None else file(text)
    with pytest.raises(SpeculatorError, match=words) as error:
        read_plan(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["timestamp", "int", "bool"])
def test_yaml_does_not_depend_on_what_other_packages_made_of_its_loader(monkeypatch, kind):
    as_text = yaml.SafeLoader.yaml_constructors["tag:yaml.org,2002:str"]
    monkeypatch.setitem(yaml.SafeLoader.yaml_constructors, f"tag:yaml.org,2002:{kind}", as_text)
    assert load_yaml("[2001-01-02, 3, yes]") == [datetime.date(2001, 1, 2), 3, True]


def test_sections_are_read_without_a_file():
    plan = GenerationPlan.read(
        {"data": {"verifier": "v", "datasets": [{"path": "x"}]}, "sync": SyncConfig(path="s")},
        "here",
    )
    assert plan.sync.kind == "disk"


def test_a_data_set_may_be_its_path_alone(file):
    [alone] = read_plan(
        file(
            WHOLE.replace(
                "{path: chats.jsonl, limit: 5, columns: {messages: turns}}", "chats.jsonl"
            )
        )
    ).data.datasets
    assert alone == DataGenConfig(verifier="v", datasets=[{"path": "chats.jsonl"}]).datasets[0]
