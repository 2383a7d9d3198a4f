"""Data that are made while training runs."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from speculators_core.commands.train import STOPPED_EXIT
from speculators_core.data_generation.engines.pipeline import schema_of
from speculators_core.data_generation.lengths import Lengths
from speculators_core.data_generation.packing import RowLayout
from speculators_core.data_generation.queues.zmq_store import ZmqStore
from speculators_core.data_generation.runs.generate import generate_data_process
from speculators_core.data_generation.settings import read_plan
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError
from speculators_core.training.settings import TrainingPlan
from speculators_core.training.train import train
from speculators_core.training.watch import MarkRowsUsed
from tests.data_generation.processes import processes
from tests.data_generation.queues.queue_processes import wait_until
from tests.training.making import NUM_EXAMPLES, log_of, plan_of, weights_of


def sourced(given, output, **source):
    return plan_of(
        given,
        output,
        data={"store": None, **source},
        evaluation={"num_prompts": 2},
    )


def test_texts_train_as_their_store_does(given, tmp_path):
    stored = train(plan_of(given, tmp_path / "stored", evaluation={"num_prompts": 2}))
    report = train(sourced(given, tmp_path / "texts", texts=str(given / "data.yaml")))
    ours, expected = weights_of(report.speculator), weights_of(stored.speculator)
    for name in expected:
        assert torch.allclose(ours[name].float(), expected[name].float(), atol=1e-2), name
    losses = [
        [line["loss"] for line in log_of(tmp_path / run) if "loss" in line]
        for run in ("texts", "stored")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_texts_with_answers_to_be_written_are_refused(given, tmp_path):
    sections = yaml.safe_load((given / "data.yaml").read_text())
    sections["data"]["states"]["tokens"] = "all"
    sections["engine"]["max_new_tokens"] = 8
    (given / "all.yaml").write_text(yaml.safe_dump(sections))
    with pytest.raises(SpeculatorError, match="tokens is all, which needs.*expected prompt"):
        train(sourced(given, tmp_path / "run", texts=str(given / "all.yaml")))


def test_one_command_starts_both_sides_and_stops_both(given, tmp_path):
    plan = sourced(given, tmp_path / "run", online=str(given / "data.yaml"))
    report = train(plan)
    assert report.steps == 8
    assert not multiprocessing.active_children()
    lines = [line for line in log_of(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [4, 8]
    assert not list(tmp_path.rglob("*.arrow")) and not (tmp_path / "run" / "shards").exists()


def test_the_command_ends_without_a_warning_of_what_it_left(given, tmp_path):
    plan = sourced(given, tmp_path / "run", online=str(given / "data.yaml"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    command = [sys.executable, "-m", "speculators_core", "train", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert (tmp_path / "run" / "speculator").is_dir()


def test_online_data_begin_anew_with_each_pass(given, tmp_path):
    changes = {"run": {"max_steps": 30}, "evaluation": {"decode": False, "every": 30}}
    data = {"store": None, "online": str(given / "data.yaml"), "eval_examples": 6}
    report = train(plan_of(given, tmp_path / "run", data=data, **changes))
    assert report.steps == 30  # the data fill about twenty rows


def test_online_learns_what_the_store_teaches_in_its_order(given, tmp_path):
    """The same examples in the same rows: the same losses, step by step."""
    from speculators_core.training.job import Job

    data = {"store": None, "online": str(given / "data.yaml"), "eval_examples": 0}
    quiet = {"decode": False, "roll_outs": 0}
    plan = plan_of(given, tmp_path / "run", data=data, evaluation=quiet)
    with Job.open(plan) as job:
        streamed, keys = [next(iter(job.rows))["input_ids"]], [job.rows.keys_of(0)]
        generation = job.source._process._process.pid
        assert os.getsid(generation) != os.getsid(0)  # a signal to our group is not for it
        while sum(map(len, keys)) < NUM_EXAMPLES:
            streamed.append(next(iter(job.rows))["input_ids"])
            keys.append(job.rows.keys_of(len(keys)))
    assert sum(len(row) for row in keys) == NUM_EXAMPLES
    assert [key for row in keys for key in row] == [f"0/{n}" for n in range(NUM_EXAMPLES)]
    rows = [json.loads(line) for line in (given / "rows.jsonl").read_text().splitlines()]
    first = [token for n in range(len(keys[0])) for token in rows[n]["input_ids"]]
    assert streamed[0][0, : len(first)].tolist() == first


def test_a_stream_of_held_out_examples_alone_is_no_training(given, tmp_path):
    data = {"store": None, "online": str(given / "data.yaml"), "eval_examples": 64}
    with pytest.raises(SpeculatorError, match="had no more rows to train on after step 0 of 8"):
        train(plan_of(given, tmp_path / "run", data=data, evaluation={"num_prompts": 2}))
    assert not (tmp_path / "run" / "speculator").exists()


def test_a_generation_that_fails_ends_the_training_with_its_line(given, tmp_path):
    sections = yaml.safe_load((given / "data.yaml").read_text())
    sections["data"]["datasets"] = [{"path": str(given / "gone.jsonl")}]
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump(sections))
    with pytest.raises(SpeculatorError, match="gone.jsonl"):
        train(sourced(given, tmp_path / "run", online=str(tmp_path / "gone.yaml")))
    assert not multiprocessing.active_children()


def test_a_queue_feeds_the_training_from_elsewhere(given, tmp_path, free_port):
    sections = yaml.safe_load((given / "data.yaml").read_text())
    sections["sync"] = {
        "kind": "zmq",
        "urls": [f"tcp://127.0.0.1:{free_port}"],
        "dtype": "float32",
        "shard_tokens": 200,
    }
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump(sections))
    with generate_data_process(read_plan(tmp_path / "elsewhere.yaml")) as generation:
        report = train(sourced(given, tmp_path / "run", queue=str(tmp_path / "elsewhere.yaml")))
        generation.stop()
    assert report.steps == 8


def elsewhere(given, folder, port, **sync):
    """The plan of a generation elsewhere, and the file that it is in."""
    sections = yaml.safe_load((given / "data.yaml").read_text())
    urls = [f"tcp://127.0.0.1:{port}"]
    sections["sync"] = {"kind": "zmq", "urls": urls, "dtype": "float32", **sync}
    (folder / "elsewhere.yaml").write_text(yaml.safe_dump(sections))
    return read_plan(folder / "elsewhere.yaml"), folder / "elsewhere.yaml"


def train_and_leave(plan: str) -> None:
    torch.set_num_threads(1)
    if train(TrainingPlan.model_validate_json(plan)).speculator is None:
        sys.exit(STOPPED_EXIT)


def children_of(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def stopped_at(plan, num_steps, pause_s=0.0):
    """A training of which all processes get SIGTERM after so many steps; how it ended."""
    log = plan.run.output / "training_log.jsonl"
    training = processes.Process(target=train_and_leave, args=(plan.model_dump_json(),))
    training.start()
    wait_until(lambda: log.exists() and log.read_text().count("\n") >= num_steps, timeout_s=90)
    time.sleep(pause_s)
    for pid in training.pid, *children_of(training.pid):
        os.kill(pid, signal.SIGTERM)
    training.join(timeout=30)
    return training.exitcode, [path.name for path in plan.run.output.glob("checkpoint-*")]


def rows_in_order(given):
    """Keys of the rows of the examples but the first six, which are held out."""
    store = DiskStore.open(given / "states")
    examples = sorted(store.read(), key=lambda example: int(example.key[2:]))
    layout = RowLayout.of(store.schema, None, 64)
    return examples, [[example.key for example in row] for row in layout.rows(examples[6:])]


WITHOUT_EVALUATION = {"decode": False, "roll_outs": 0, "every": 1000}


def test_a_training_that_waits_for_a_queue_is_saved_and_stopped(given, tmp_path, free_port):
    """It has dealt with what it trained on, and with nothing else."""
    generation, file = elsewhere(given, tmp_path, free_port, heartbeat_s=0.4)
    examples, rows = rows_in_order(given)
    plan = plan_of(
        given,
        tmp_path / "run",
        data={"store": None, "queue": str(file)},
        evaluation=WITHOUT_EVALUATION,
        optimizer={"rows_per_step": 2},
        run={"max_steps": 50},
    )
    sink = ZmqStore.sink(schema_of(generation), generation.sync)
    sender = threading.Thread(target=sink.write_batch, args=(examples[:30],))
    sender.start()
    try:
        known = [row for row in rows if all(int(key[2:]) < 30 for key in row)]
        has_room = known[-1][-1] == "0/29"  # then it waits for what comes next
        num_steps = (len(known) - has_room) // 2
        assert num_steps > 1
        assert stopped_at(plan, num_steps) == (STOPPED_EXIT, [f"checkpoint-{num_steps}"])
        used = {key for row in rows[: 2 * num_steps] for key in row}
        state = tmp_path / "run" / f"checkpoint-{num_steps}" / "trainer_state.json"
        lengths = Lengths.of(len(examples[int(key[2:])].input_ids) for key in used)
        saved = json.loads(state.read_text())["stateful_callbacks"][MarkRowsUsed.KEY]
        assert Lengths.model_validate(saved) == lengths
        assert set(sink.take_acknowledged()) == used | {f"0/{n}" for n in range(6)}
    finally:
        sink.abort()
        sender.join()


def test_a_signal_to_the_whole_job_is_no_fault_of_its_generation(given, tmp_path):
    """It comes in the second pass, while the next generation starts."""
    num_rows = len(rows_in_order(given)[1])
    sections = yaml.safe_load((given / "data.yaml").read_text())
    sections["sync"]["heartbeat_s"] = 0.4
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(sections))
    plan = plan_of(
        given,
        tmp_path / "run",
        data={"store": None, "online": str(tmp_path / "data.yaml")},
        evaluation=WITHOUT_EVALUATION,
        run={"max_steps": 500},
    )
    code, states = stopped_at(plan, num_rows, pause_s=1.0)
    assert code == STOPPED_EXIT
    assert states == [f"checkpoint-{num_rows}"]


def test_a_queue_that_ends_early_says_so(given, tmp_path, free_port):
    sections = yaml.safe_load((given / "data.yaml").read_text())
    urls = [f"tcp://127.0.0.1:{free_port}"]
    sections["sync"] = {"kind": "zmq", "urls": urls, "dtype": "float32"}
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump(sections))
    plan = plan_of(
        given,
        tmp_path / "run",
        data={"store": None, "queue": str(tmp_path / "elsewhere.yaml")},
        evaluation={"decode": False},
        run={"max_steps": 500},
    )
    with (
        generate_data_process(read_plan(tmp_path / "elsewhere.yaml")),
        pytest.raises(SpeculatorError, match="data.queue ended before run.max_steps"),
    ):
        train(plan)


def test_a_queue_has_a_url_for_each_process(given, tmp_path):
    with pytest.raises(SpeculatorError, match="kind is disk with 0 sync.urls; expected zmq with 1"):
        train(sourced(given, tmp_path / "run", queue=str(given / "data.yaml")))
