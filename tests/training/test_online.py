"""Data that are made while training runs."""

import json
import multiprocessing

import pytest
import torch
import yaml

from speculators_core.data_generation.generate import generate_data_process
from speculators_core.data_generation.settings import read_plan
from speculators_core.errors import SpeculatorError
from speculators_core.training.train import train
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
    with pytest.raises(SpeculatorError, match="set data.states.tokens to prompt"):
        train(sourced(given, tmp_path / "run", texts=str(given / "all.yaml")))


def test_one_command_starts_both_sides_and_stops_both(given, tmp_path):
    plan = sourced(given, tmp_path / "run", online=str(given / "data.yaml"))
    report = train(plan)
    assert report.steps == 8
    assert not multiprocessing.active_children()
    lines = [line for line in log_of(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [4, 8]
    assert not list(tmp_path.rglob("*.arrow")) and not (tmp_path / "run" / "shards").exists()


def test_online_data_begin_anew_with_each_epoch(given, tmp_path):
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
        streamed = [row["input_ids"] for row in job.rows]
        keys = [job.rows.keys_of(number) for number in range(len(streamed))]
    assert sum(len(row) for row in keys) == NUM_EXAMPLES
    assert [key for row in keys for key in row] == [f"0/{n}" for n in range(NUM_EXAMPLES)]
    rows = [json.loads(line) for line in (given / "rows.jsonl").read_text().splitlines()]
    first = [token for n in range(len(keys[0])) for token in rows[n]["input_ids"]]
    assert streamed[0][0, : len(first)].tolist() == first


def test_a_stream_of_held_out_examples_alone_is_no_training(given, tmp_path):
    data = {"store": None, "online": str(given / "data.yaml"), "eval_examples": 64}
    with pytest.raises(SpeculatorError, match="gave no row that trains after step 0 of 8"):
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
        pytest.raises(SpeculatorError, match="data.queue has ended before run.max_steps"),
    ):
        train(plan)


def test_a_queue_has_a_url_for_each_process(given, tmp_path):
    with pytest.raises(SpeculatorError, match="kind disk and 0 urls; expected zmq and 1"):
        train(sourced(given, tmp_path / "run", queue=str(given / "data.yaml")))
