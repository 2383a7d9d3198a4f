import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from speculators_core.cli import main
from speculators_core.data_generation.dataset import GeneratedDataset
from speculators_core.data_generation.engines.pipeline import schema_of
from speculators_core.data_generation.engines.transformers import TransformersPipeline
from speculators_core.data_generation.examples import Failure
from speculators_core.data_generation.queues.zmq_store import ZmqStore
from speculators_core.data_generation.runs.generate import (
    RunReport,
    generate_data,
    generate_data_process,
    print_report,
)
from speculators_core.data_generation.runs.preparation import placed, prepare
from speculators_core.data_generation.runs.progress import Meter, _Line
from speculators_core.data_generation.runs.targets import Arrived, QueueTarget
from speculators_core.data_generation.runs.workers import (
    UnitDone,
    UnitProgress,
    WorkerDone,
    _on_device,
    generate_data_worker,
    messages_of,
    read_told,
    run_here,
    to_json,
)
from speculators_core.data_generation.settings import GenerationPlan, SyncConfig, read_plan
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError
from speculators_core.provenance import without_secrets
from tests.conftest import VOCAB_SIZE, make_verifier
from tests.data_generation.processes import processes
from tests.data_generation.running import consume, run_slowly
from tests.vllm.serving import write_tokenizer

NUM_ROWS = 40
COMMAND = str(Path(sys.executable).with_name("speculators"))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a verifier and token ids to run through it."""
    folder = tmp_path_factory.mktemp("given")
    make_verifier().save_pretrained(folder / "verifier")
    write_tokenizer(folder / "verifier", VOCAB_SIZE)
    draw = random.Random(0)
    rows = [
        {"input_ids": [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(3, 30))]}
        for _ in range(NUM_ROWS)
    ]
    write_rows(folder / "rows.jsonl", rows)
    return folder


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def plan_of(given, store, rows="rows.jsonl", **sections):
    content = {
        "data": {
            "verifier": str(given / "verifier"),
            "datasets": [{"path": str(given / rows)}],
            "states": {"layer_ids": [1, 3]},
        },
        "engine": {"max_length": 40},
        "sync": {"path": str(store), "shard_tokens": 100, "dtype": "float32"},
        "run": {"allowed_roots": ["/"]},
    }
    for name, options in sections.items():
        content[name] = content[name] | options
    return GenerationPlan.read(content, "test")


def contents(folder):
    """All bytes that a run decides."""
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    report = generate_data(plan_of(given, folder))
    assert report.num_examples == NUM_ROWS and report.num_units > 5
    return folder


def test_every_row_becomes_an_example_that_training_takes(given, undisturbed):
    rows = [json.loads(line) for line in (given / "rows.jsonl").read_text().splitlines()]
    store = DiskStore.open(undisturbed)
    assert store.is_complete
    assert [e.input_ids.tolist() for e in store.read()] == [row["input_ids"] for row in rows]
    loader = DataLoader(GeneratedDataset(undisturbed, row_length=64), batch_size=None)
    assert sum(int(batch.loss_mask.sum()) for batch in loader) == sum(
        len(row["input_ids"]) for row in rows
    )


def test_several_workers_make_the_bytes_that_one_makes(given, undisturbed, tmp_path):
    generate_data(plan_of(given, tmp_path / "store", run={"workers": 2}))
    assert contents(tmp_path / "store") == contents(undisturbed)


def test_what_is_there_is_not_made_again(given, undisturbed, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(undisturbed, folder)
    (folder / "shards" / "000002.safetensors").unlink()
    before = (folder / "shards" / "000001.safetensors").stat().st_mtime_ns
    with pytest.raises(SpeculatorError, match="--run.resume"):
        generate_data(plan_of(given, folder))
    report = generate_data(plan_of(given, folder, run={"resume": True}))
    assert report.num_units - report.num_units_kept == 1
    assert (folder / "shards" / "000001.safetensors").stat().st_mtime_ns == before
    assert contents(folder) == contents(undisturbed)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_damaged_shards_are_named_and_made_again(given, tmp_path, compression):
    folder = tmp_path / "store"
    sync = {"compression": compression}
    generate_data(plan_of(given, folder, sync=sync))
    whole = contents(folder)
    names = list(whole)
    for name, edit in zip(names, (lambda c: c[:-9], lambda c: c[:-3] + b"???"), strict=False):
        (folder / "shards" / name).write_bytes(edit(whole[name]))
    with pytest.raises(SpeculatorError, match=f"{names[0]} is damaged.*--run.repair"):
        generate_data(plan_of(given, folder, sync=sync, run={"resume": True}))
    report = generate_data(plan_of(given, folder, sync=sync, run={"repair": True}))
    assert report.num_units - report.num_units_kept == 2
    assert contents(folder) == whole


def command_of(plan, folder):
    """The run as a user starts it."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(plan.model_dump(mode="json", exclude_defaults=True)))
    return [COMMAND, "generate-data", "--config", str(config), "--run.resume"]


KILLS = 20


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_makes_the_same_bytes(given, tmp_path):
    """At random moments; most of them while it makes its shards."""
    folder = tmp_path / "store"
    small = {"shard_tokens": 30}
    plan = plan_of(given, folder, run={"resume": True}, sync=small)
    draw, longest = random.Random(1), 0.3
    for _ in range(KILLS):
        with running(run_slowly, plan.model_dump_json()):
            time.sleep(draw.uniform(0.05, longest))
        if not any(folder.glob("shards/*")):  # a busy machine takes longer to the first one
            longest *= 1.5
    made = len(contents(folder))
    generate_data(plan)
    whole = contents(folder)
    assert 0 < made < len(whole)
    generate_data(plan_of(given, tmp_path / "undisturbed", sync=small))
    assert whole == contents(tmp_path / "undisturbed")
    assert [e.key for e in DiskStore.open(folder).read()] == [f"0/{i}" for i in range(NUM_ROWS)]


@contextmanager
def running(work, *arguments):
    """A process that does it; killed at the end if it has not ended by then."""
    process = processes.Process(target=work, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(is_so, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zmq", "mp_queue"])
def test_a_queue_gets_every_example_though_runs_and_a_consumer_are_killed(
    given, undisturbed, tmp_path, kind
):
    schema = DiskStore.open(undisturbed).schema

    def plan(consumer):
        sync = {"kind": kind, "urls": [url_of(consumer)], "queue_size": 4, "heartbeat_s": 0.4}
        return plan_of(given, tmp_path / "journal", sync=sync, run={"resume": True})

    def url_of(consumer):
        path = tmp_path / f"{consumer}.url"
        wait_for(path.exists)
        return path.read_text()

    def arrived(consumer):
        path = tmp_path / f"{consumer}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    with running(consume, kind, schema.model_dump_json(), tmp_path, "first"):
        for count in (5, 15):  # two runs are killed, and the consumer with the second
            with running(run_slowly, plan("first").model_dump_json()):
                wait_for(lambda least=count: len(arrived("first")) >= least)
    with running(consume, kind, schema.model_dump_json(), tmp_path, "second") as consumer:
        report = generate_data(plan("second"))
        consumer.join(60)
    first, second = arrived("first"), arrived("second")
    keys = [told["key"] for told in first]
    assert len(set(keys)) == len(keys)  # the same consumer never gets one twice
    twice = set(keys) & {told["key"] for told in second}
    assert len(twice) <= 4  # it was killed before it could say that it had dealt with them
    assert len(second) < NUM_ROWS and report.num_units_kept > 0
    expected = {
        example.key: (example.input_ids.tolist(), float(example.hidden_states.double().sum()))
        for example in DiskStore.open(undisturbed).read()
    }
    assert {told["key"]: (told["ids"], told["sum"]) for told in first + second} == expected


@pytest.mark.slow
def test_a_killed_worker_is_named_and_the_next_run_goes_on(given, undisturbed, tmp_path):
    folder = tmp_path / "store"
    plan = plan_of(given, folder, run={"workers": 2})
    process = subprocess.Popen(
        command_of(plan, tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    worker = wait_for_worker(process.pid)
    os.kill(worker, signal.SIGKILL)
    _, told = process.communicate()
    assert process.returncode == 2
    assert "was killed by SIGKILL. What the workers stored is kept" in told
    assert not (folder / "report.json").exists()
    assert (folder / "command.txt").read_text().startswith("speculators generate-data --config ")
    generate_data(plan_of(given, folder, run={"resume": True}))
    assert contents(folder) == contents(undisturbed)


def wait_for_worker(pid, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for child in children_of(pid):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        time.sleep(0.02)
    raise AssertionError("no worker was started")


def children_of(pid):
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(child) for child in found]


class FailingOn(TransformersPipeline):
    """An engine that fails on texts with a certain token."""

    def steps(self, examples):
        results = yield from super().steps(examples)
        return [
            Failure(result.key, "it holds a 5") if (example.input_ids == 5).any() else result
            for example, result in zip(examples, results, strict=True)
        ]


@pytest.fixture
def failing(monkeypatch):
    # The table of engines names the class by its module, where it is replaced.
    monkeypatch.setattr(
        "speculators_core.data_generation.engines.transformers.TransformersPipeline", FailingOn
    )


def test_an_example_that_fails_is_set_aside_with_its_reason(given, undisturbed, tmp_path, failing):
    folder = tmp_path / "store"
    report = generate_data(plan_of(given, folder))
    expected = {
        f"0/{number}": "it holds a 5"
        for number, example in enumerate(DiskStore.open(undisturbed).read())
        if (example.input_ids == 5).any()
    }
    assert report.set_aside == DiskStore.open(folder).set_aside() == expected
    assert 0 < len(expected) < NUM_ROWS
    assert report.num_examples == NUM_ROWS - len(expected)
    again = generate_data(plan_of(given, folder, run={"resume": True}))
    assert again.set_aside == expected


@pytest.mark.parametrize(("rows", "code"), [([[5, 6], [7, 8]], 0), ([[5, 6], [5, 9, 8]], 1)])
def test_a_summary_counts_what_is_left_out_and_an_empty_store_is_exit_code_1(
    given, tmp_path, failing, capsys, rows, code
):
    write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    plan = plan_of(given, tmp_path / "store", tmp_path / "rows.jsonl")
    for resume in ([], ["--run.resume"]):
        with pytest.raises(SystemExit) as ended:
            main([*command_of(plan, tmp_path)[1:-1], *resume])
        assert ended.value.code == code
        said = " ".join(capsys.readouterr().out.split())
        assert said.endswith(f"left out: {1 + code} row{'s' * code}: it holds a 5")
        verb = "nothing was added" if resume else "wrote 1 examples"
        assert f" {'nothing was written' if code else verb} to {tmp_path}" in said


def test_examples_set_aside_are_tried_again_with_repair(given, tmp_path, failing, monkeypatch):
    folder, small = tmp_path / "store", {"shard_tokens": 40}
    failed = generate_data(plan_of(given, folder, sync=small)).set_aside
    with_failures = [p for p, header in DiskStore.open(folder).headers() if header.set_aside]
    assert 0 < len(with_failures) < len(contents(folder))
    monkeypatch.undo()
    resumed = generate_data(plan_of(given, folder, sync=small, run={"resume": True}))
    assert resumed.set_aside == failed and resumed.num_units == resumed.num_units_kept
    tight = {"repair": True, "max_failures": 0}  # those that are tried again do not count
    repaired = generate_data(plan_of(given, folder, sync=small, run=tight))
    assert repaired.set_aside == {}
    assert repaired.num_units - repaired.num_units_kept == len(with_failures)
    generate_data(plan_of(given, tmp_path / "never failed", sync=small))
    assert contents(folder) == contents(tmp_path / "never failed")


def test_more_failures_than_allowed_end_the_run(given, tmp_path, failing):
    with pytest.raises(SpeculatorError, match=r"\d examples failed.*\(1\); the last, 0/\d+: it"):
        generate_data(plan_of(given, tmp_path / "store", run={"max_failures": 1}))
    assert not DiskStore.open(tmp_path / "store").is_complete


def test_failures_of_all_runs_count(given, tmp_path, failing):
    plan = plan_of(given, tmp_path / "store", run={"max_failures": 1, "resume": True})
    for _ in range(2):
        with pytest.raises(SpeculatorError, match=r"examples failed.*\(1\)"):
            generate_data(plan)


def test_a_limit_ends_the_run_early(given, undisturbed, tmp_path):
    report = generate_data(plan_of(given, tmp_path / "store", run={"limit": 7}))
    assert report.num_examples == report.counts["rows"] == 7
    found = [example.key for example in DiskStore.open(tmp_path / "store").read()]
    assert found == [f"0/{number}" for number in range(7)]


def test_a_shard_has_as_many_tokens_as_asked(undisturbed, given, tmp_path):
    for _, header in DiskStore.open(undisturbed).headers():
        assert header.num_tokens <= 100
    plan = plan_of(given, tmp_path / "store", sync={"shard_tokens": 10})
    generate_data(plan)
    headers = DiskStore.open(tmp_path / "store").headers()
    assert all(len(h.entries) == 1 or h.num_tokens <= 10 for _, h in headers)


def test_two_runs_do_not_write_to_one_folder(given, tmp_path):
    process = generate_data_process(plan_of(given, tmp_path / "store"))
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "store" / "config.yaml").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(SpeculatorError, match="another run is writing there"):
            generate_data(plan_of(given, tmp_path / "store"))
        assert process.report().num_examples == NUM_ROWS
        assert process.report().num_examples == NUM_ROWS
    finally:
        process.stop()


def test_a_run_in_a_process_tells_its_fault(given, tmp_path):
    plan = plan_of(given, tmp_path / "store", rows="nowhere.jsonl")
    with (
        generate_data_process(plan) as process,
        pytest.raises(SpeculatorError, match="nowhere.jsonl"),
    ):
        process.report()


def changed_options(plan):
    engine = plan.engine.model_copy(update={"batch_size": 3})
    return plan.model_copy(update={"engine": engine})


def changed_data(plan):
    path = Path(plan.data.datasets[0].path)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    return plan


def shortened_data(plan):
    path = Path(plan.data.datasets[0].path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    return plan


def changed_verifier(plan):
    make_verifier(initializer_range=0.3).save_pretrained(plan.data.verifier)
    return plan


CHANGES = {
    changed_options: "made with engine.batch_size None, but it is now 3",
    changed_data: "was made from other texts",
    shortened_data: "was made from other texts",
    changed_verifier: "made with weights",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_something_else(given, tmp_path, change):
    shutil.copytree(given, tmp_path / "given")
    plan = plan_of(tmp_path / "given", tmp_path / "store", run={"resume": True})
    generate_data(plan)
    before = contents(tmp_path / "store")
    with pytest.raises(SpeculatorError, match=CHANGES[change]):
        generate_data(change(plan))
    assert contents(tmp_path / "store") == before


def test_shards_that_no_unit_is_are_refused(given, tmp_path):
    """Data that lost their end, cut where a unit ended."""
    shutil.copytree(given, tmp_path / "given")
    plan = plan_of(tmp_path / "given", tmp_path / "store", run={"resume": True})
    generate_data(plan)
    (_, first), *_ = DiskStore.open(tmp_path / "store").headers()
    rows = tmp_path / "given" / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[: len(first.entries)]))
    with pytest.raises(
        SpeculatorError, match="000001.* not belong to this run; expected shards 0 to 0"
    ):
        generate_data(plan)


def test_a_queue_is_gone_on_with_when_that_is_asked_for(given, tmp_path):
    sync = {"kind": "zmq", "urls": ["tcp://127.0.0.1:9"]}
    plan = plan_of(given, tmp_path / "journal", sync=sync)
    prepare(placed(plan))
    with pytest.raises(SpeculatorError, match="holds the journal of a run.*--run.resume"):
        generate_data(plan)
    other = plan_of(given, tmp_path / "journal", sync=sync | {"dtype": "float16"})
    run = {"resume": True, "allowed_roots": ["/"]}
    with pytest.raises(SpeculatorError, match="made with dtype 'float32', but it is now 'float16'"):
        generate_data(GenerationPlan.read(other.model_dump() | {"run": run}, "test"))
    with pytest.raises(SpeculatorError, match="sync.path is missing"):
        plan_of(given, tmp_path, sync=sync | {"path": None}, run={"resume": True})


def test_after_an_error_nothing_waits_for_a_consumer(given, tmp_path, monkeypatch):
    def broken(self, examples):
        raise SpeculatorError("the engine broke")

    monkeypatch.setattr(TransformersPipeline, "steps", broken)
    source = ZmqStore.source(
        schema_of(plan_of(given, tmp_path)), SyncConfig(kind="zmq"), "tcp://127.0.0.1:*"
    )
    sync = {"kind": "zmq", "urls": [source.url], "path": None}
    with pytest.raises(SpeculatorError, match="the engine broke"):
        generate_data(plan_of(given, tmp_path, sync=sync))
    source.close()
    assert not [t for t in threading.enumerate() if t.name == "example-queue"]


@pytest.mark.slow
def test_a_run_that_waits_for_a_consumer_can_be_interrupted(given, tmp_path):
    source = ZmqStore.source(
        schema_of(plan_of(given, tmp_path)),
        SyncConfig(kind="zmq", queue_size=2, heartbeat_s=0.4),
        "tcp://127.0.0.1:*",
    )
    sync = {"kind": "zmq", "urls": [source.url], "path": None, "heartbeat_s": 0.4}
    plan = plan_of(given, tmp_path, sync=sync)
    command = command_of(plan, tmp_path)[:-1]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )
    examples = source.read()
    next(examples)  # the run has begun, and now waits
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    source.close()


def test_each_worker_has_its_share(given, tmp_path):
    plan = placed(plan_of(given, tmp_path / "store", run={"workers": 2}))
    prepare(plan)
    told = list(run_here(plan))
    units = [(one.worker, one.unit) for one in told if isinstance(one, UnitDone)]
    assert {worker for worker, _ in units} == {0, 1}
    assert all(unit % 2 == worker for worker, unit in units)


def test_workers_take_gpus_in_turn(given, tmp_path, monkeypatch):
    def devices(count, **options):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        plan = plan_of(given, tmp_path, run={"workers": 3}, **options)
        return [_on_device(plan, worker).engine.device for worker in range(3)]

    assert devices(2, engine={"device": "cuda"}) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices(0, engine={"device": "cuda"}) == ["cuda"] * 3
    assert devices(2, engine={"device": "cpu"}) == ["cpu"] * 3


def test_a_servers_key_reaches_workers_and_no_file(given, tmp_path):
    plan = plan_of(given, tmp_path, engine={"api_key": "sk-1"})
    assert GenerationPlan.model_validate_json(to_json(plan)).engine.api_key == "sk-1"
    shown = without_secrets(["x", "--engine.api-key", "sk-1", "--engine.api_key=sk-1", "--y", "z"])
    assert shown == ["x", "--engine.api-key", "***", "--engine.api_key=***", "--y", "z"]
    for flag in ("--hub-token", "--run.my_password", "--client-SECRET"):
        assert without_secrets([flag, "v", f"{flag}=v"]) == [flag, "***", f"{flag}=***"]
    assert without_secrets(["--keys", "v", "monkey", "v"]) == ["--keys", "v", "monkey", "v"]


@pytest.mark.parametrize("name", ["shards", ".lock", "generate.log"])
def test_links_out_of_the_store_are_not_followed(given, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir() if name == "shards" else outside.write_text("dear")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / name).symlink_to(outside)
    roots = [str(given), str(tmp_path / "store")]
    with pytest.raises(SpeculatorError):
        generate_data(plan_of(given, tmp_path / "store", run={"allowed_roots": roots}))
    assert not list(outside.iterdir()) if name == "shards" else outside.read_text() == "dear"


def test_a_log_line_comes_however_long_a_unit_takes(given, tmp_path, monkeypatch):
    monkeypatch.setattr("speculators_core.data_generation.runs.progress.LINE_EVERY_S", 0.02)
    steps = TransformersPipeline.steps
    monkeypatch.setattr(
        TransformersPipeline, "steps", lambda self, e: (time.sleep(0.3), steps(self, e))[1]
    )
    generate_data(plan_of(given, tmp_path / "store", run={"limit": 2}))
    assert len((tmp_path / "store" / "generate.log").read_text().splitlines()) > 5


@pytest.mark.parametrize("every_s", [0, 60])
def test_tokens_of_a_unit_count_before_it_is_stored(given, tmp_path, monkeypatch, every_s):
    monkeypatch.setattr("speculators_core.data_generation.runs.workers.PROGRESS_EVERY_S", every_s)
    plan = placed(
        plan_of(given, tmp_path / "s", engine={"batch_size": 2}, sync={"shard_tokens": 200})
    )
    prepare(plan)
    meter, seen = Meter(None), []
    for told in generate_data_worker(plan):
        if isinstance(told, WorkerDone):
            continue
        told = read_told(next(messages_of(lambda told=told: iter([told]))))  # as between processes
        meter.add(told)
        seen.append((told, meter.num_tokens_run, meter.line()))
    done = [one for one, *_ in seen if isinstance(one, UnitDone)]
    early = [one for one, *_ in seen if isinstance(one, UnitProgress)]
    assert bool(early) == (every_s == 0)
    for unit in {one.unit for one in early}:
        of_unit = [one.num_tokens for one in early if one.unit == unit]
        assert sum(of_unit) == done[unit].num_tokens and len(of_unit) > 1
    first_tokens, first_line = seen[0][1:]
    assert f"0 examples, {first_tokens} tokens" in first_line if early else done[0].num_tokens
    assert meter.num_tokens_run == meter.num_tokens == sum(one.num_tokens for one in done)


def test_the_bar_shows_what_the_meter_says_whenever_it_is_drawn():
    meter = Meter(None)
    meter.add(UnitProgress(unit=3, num_tokens=12345))
    assert "12345 tokens" in str(_Line(meter).render(None))


def test_the_time_left_goes_by_the_rows():
    meter = Meter(total_rows=100)
    assert meter.left_s is None
    meter.started -= 10
    for rows in (20, 60):
        meter.add(UnitDone(worker=0, unit=0, rows=rows, num_tokens=1))
    assert meter.left_s == pytest.approx(10, rel=0.1)
    assert "s left" in meter.line()


def test_a_torn_line_of_a_journal_costs_that_line_alone(tmp_path):
    journal = tmp_path / "arrived-000.jsonl"
    journal.write_text('\n{"unit": 0}\n{"unit": 1, "key": "0/3"}\n{"unit": 2, "key": [1]}\n{"uni')
    target = QueueTarget(None, tmp_path, worker=0)
    target._write([{"unit": 4}])
    arrived = Arrived.read(tmp_path)
    assert arrived.units == {0, 4} and arrived.keys == {"0/3"}


def test_what_the_plan_names_lies_anywhere(given, tmp_path):
    run = {"allowed_roots": [str(tmp_path / "nowhere")], "log_file": str(tmp_path / "own.log")}
    plan = plan_of(given, tmp_path / "store", run=run | {"limit": 1})
    assert generate_data(plan).num_examples == 1 and (tmp_path / "own.log").exists()


def test_the_log_and_the_config_tell_of_the_run(given, undisturbed, tmp_path):
    log = (undisturbed / "generate.log").read_text().splitlines()
    assert log[0].endswith("began") and f"ended: {NUM_ROWS} examples" in log[-1]
    again = read_plan(undisturbed / "config.yaml")
    assert again == plan_of(given, undisturbed)
    plan = plan_of(given, tmp_path / "store", run={"log_file": str(tmp_path / "own.log")})
    generate_data(plan)
    assert "ended" in (tmp_path / "own.log").read_text()


def test_flags_win_over_the_file_and_the_report_is_json(given, tmp_path):
    plan = plan_of(given, tmp_path / "one")
    command = command_of(plan, tmp_path)[:-1]
    flags = ["--sync.path", str(tmp_path / "two"), "--run.limit", "3", "--engine.batch-size", "2"]
    done = subprocess.run([*command, *flags, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_examples"] == 3
    assert not (tmp_path / "one").exists()
    resolved = read_plan(tmp_path / "two" / "config.yaml")
    assert resolved.engine.batch_size == 2 and resolved.engine.max_length == 40


@pytest.fixture
def inspect(capsys):
    def call(folder, *flags):
        with pytest.raises(SystemExit) as end:
            main(["inspect", str(folder), *flags])
            raise SystemExit(0)
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


def test_inspect_tells_what_is_inside(undisturbed, inspect):
    code, out, _ = inspect(undisturbed, "--example", "3")
    assert code == 0
    for words in ("examples", "1 3 4", "float32 [3, 32]", "example 3, key 0/3", "complete"):
        assert words in out
    tokens = DiskStore.open(undisturbed)[3].input_ids
    assert " ".join(map(str, tokens[:2].tolist())) in out
    _, shortened, _ = inspect(undisturbed, "--example", "3", "--max-shown-tokens", "2")
    assert f"{len(tokens) - 2} more tokens" in shortened
    told = json.loads(inspect(undisturbed, "--json")[1])
    assert told["num_examples"] == NUM_ROWS and told["is_complete"]


def test_the_report_tells_what_the_store_holds_beside_what_the_run_made(
    given, undisturbed, tmp_path, inspect, capsys
):
    folder = tmp_path / "store"
    shutil.copytree(undisturbed, folder)
    (folder / "shards" / "000002.safetensors").unlink()
    plan = plan_of(given, folder, run={"resume": True})
    report = generate_data(plan)
    assert report == RunReport.model_validate_json((folder / "report.json").read_text())
    capsys.readouterr()
    found = json.loads(inspect(folder, "--json")[1])
    held = report.store.model_dump()
    assert held == {name: found[name] for name in held}
    assert held["num_examples"] == NUM_ROWS
    _, made = list(DiskStore.open(folder).headers())[2]
    assert report.num_examples == len(made.entries) < NUM_ROWS
    assert report.num_tokens == made.num_tokens < held["num_tokens"]
    assert 0 < report.size_bytes < held["size_bytes"]
    print_report(report, plan)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "examples in the store" in x]
    assert str(NUM_ROWS) in line


def test_inspect_finds_damage_where_every_byte_is_read(undisturbed, inspect, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(undisturbed, folder)
    path = folder / "shards" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"??")
    assert inspect(folder)[0] == 0
    code, out, _ = inspect(folder, "--verify", "--json")
    assert code == 1
    assert list(json.loads(out)["damaged"]) == ["000001.safetensors"]


def test_inspect_refuses_what_is_no_store(undisturbed, inspect, tmp_path):
    code, _, err = inspect(tmp_path)
    assert code == 2 and "expected a store" in err
    code, _, err = inspect(undisturbed, "--example", "40")
    assert code == 2 and "--example is 40; expected 0 to 39" in err
