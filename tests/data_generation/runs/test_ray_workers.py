import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from speculators_core.data_generation.runs.generate import generate_data
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError
from tests.conftest import VOCAB_SIZE, make_verifier
from tests.data_generation.runs.test_generate import children_of, contents, plan_of, write_rows
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
    """A Ray cluster of this machine, as an administrator starts one; the id of its process."""
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
    yield head.pid
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
        "speculators_core.data_generation.runs.workers.generate_data_worker",
        lambda *_: pids.append(os.getpid()) or iter(()),
    )  # in this process, where nothing is to run
    report = generate_data(GenerationPlan.read(plan.model_dump() | {"data": data}, "test"))
    assert report.num_examples == 30 and report.counts["rows"] == 30
    assert not pids
    assert contents(given / "there") == contents(tmp_path / "here")


def working(pid):
    """Processes below this one in which Ray runs a worker."""
    found = []
    for child in children_of(pid):
        found += working(child)
        with suppress(FileNotFoundError):
            if Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"ray::_work"):
                found.append(child)
    return found


@contextmanager
def killing(head, shards, times):
    """Kills so many workers of the cluster, each when it has made a shard; yields their ids."""
    killed, is_over, num_before = [], threading.Event(), {}

    def kill():
        while len(killed) < times and not is_over.wait(0.01):
            for pid in set(working(head)) - set(killed):
                num_shards = len(list(shards.glob("*.safetensors")))
                if num_shards > num_before.setdefault(pid, num_shards):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        is_over.set()
        thread.join()


@pytest.mark.slow
def test_a_killed_worker_is_run_again_and_in_the_end_the_run_says_so(
    cluster, given, tmp_path, monkeypatch
):
    monkeypatch.setattr("speculators_core.data_generation.runs.ray_workers.MAX_RETRIES", 1)
    rows = [
        {"input_ids": [(7 * row + t * t) % VOCAB_SIZE for t in range(20)]} for row in range(200)
    ]
    write_rows(given / "many.jsonl", rows)

    def plan(folder, **run):
        options = {"sync": {"shard_tokens": 20}, "data": {"deduplicate": False}, "run": run}
        return plan_of(given, tmp_path / folder, "many.jsonl", **options)

    lost = "^A worker on Ray was lost: [^\n]* is kept; pass --run.resume to resume.$"
    with killing(cluster, tmp_path / "store" / "shards", times=2) as killed:
        with pytest.raises(SpeculatorError, match=lost):
            generate_data(plan("store", backend="ray"))
    assert len(killed) == 2
    assert not DiskStore.open(tmp_path / "store").is_complete
    report = generate_data(plan("store", resume=True))
    assert report.num_units == 200 and 2 <= report.num_units_kept < 200
    generate_data(plan("undisturbed"))
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_fault_in_a_cluster_is_one_line(cluster, given, tmp_path):
    (given / "none.jsonl").write_text('{"input_ids": "no ids"}\n')
    plan = plan_of(given, tmp_path / "store", "none.jsonl", run={"backend": "ray"})
    with pytest.raises(SpeculatorError, match="none of its first 1 rows can be used"):
        generate_data(plan)
    device = plan_of(given, tmp_path / "s", run={"backend": "ray"}, engine={"device": "cuda:1"})
    with pytest.raises(SpeculatorError, match="expected cuda or cpu with run.backend ray"):
        generate_data(device)
