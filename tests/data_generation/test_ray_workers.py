import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speculators_core.data_generation.generate import generate_data
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.errors import SpeculatorError
from tests.conftest import VOCAB_SIZE, make_verifier
from tests.data_generation.test_generate import contents, plan_of, write_rows
from tests.vllm.serving import write_tokenizer

ray = pytest.importorskip("ray")
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    make_verifier().save_pretrained(folder / "verifier")
    write_tokenizer(folder / "verifier", VOCAB_SIZE)
    rows = [{"input_ids": [(7 * row + t) % VOCAB_SIZE for t in range(20)]} for row in range(30)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray cluster of this machine, as an administrator starts one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = [RAY, "start", "--head", "--block", f"--port={address.split(':')[1]}"]
    start += ["--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=0"]
    start += ["--include-dashboard=false", "--object-store-memory=100000000"]
    before = os.environ.copy()
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    head = subprocess.Popen(
        start,
        cwd=tmp_path_factory.mktemp("ray"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.environ["RAY_ADDRESS"] = address
    _wait_until_up(head)
    yield
    assert not ray.is_initialized()  # a driver that is left behind is ended by Ray itself
    head.terminate()  # ends all that it started, and no other cluster's processes
    head.wait(60)
    os.environ.clear()
    os.environ.update(before)


def _wait_until_up(head, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and head.poll() is None:
        status = subprocess.run(
            [RAY, "status"], capture_output=True, text=True, env=os.environ.copy()
        )
        if status.returncode == 0 and "Active" in status.stdout:
            return
    raise AssertionError("Ray did not start")


@pytest.mark.slow
def test_workers_of_a_cluster_make_the_bytes_that_one_makes(cluster, given, tmp_path, monkeypatch):
    generate_data(plan_of(given, tmp_path / "here"))
    monkeypatch.chdir(given)  # relative paths are ours, not those of the cluster's processes
    plan = plan_of(given, "there", run={"workers": 2, "backend": "ray"})
    datasets = [{"path": "rows.jsonl"}]
    data = plan.data.model_dump() | {"datasets": datasets, "verifier": "verifier"}
    pids = []
    monkeypatch.setattr(
        "speculators_core.data_generation.workers.generate_data_worker",
        lambda *_: pids.append(os.getpid()) or iter(()),
    )  # in this process, where nothing is to run
    report = generate_data(GenerationPlan.read(plan.model_dump() | {"data": data}, "test"))
    assert report.num_examples == 30 and report.counts["rows"] == 30
    assert not pids
    assert contents(given / "there") == contents(tmp_path / "here")


@pytest.mark.slow
def test_a_fault_in_a_cluster_is_one_line(cluster, given, tmp_path):
    (given / "none.jsonl").write_text('{"input_ids": "no ids"}\n')
    plan = plan_of(given, tmp_path / "store", "none.jsonl", run={"backend": "ray"})
    with pytest.raises(SpeculatorError, match="None of the first 1 rows can be used"):
        generate_data(plan)
    device = plan_of(given, tmp_path / "s", run={"backend": "ray"}, engine={"device": "cuda:1"})
    with pytest.raises(SpeculatorError, match="on Ray say cuda"):
        generate_data(device)
