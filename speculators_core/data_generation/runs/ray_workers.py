"""Workers on a Ray cluster, which places them.

Each worker runs `generate_data_worker`. All machines must see the store's folder, the data and the
verifier under the same paths. When a machine is lost, Ray restarts its worker, which resumes after
its last stored unit.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speculators_core.data_generation.runs.workers import (
    Told,
    WorkerDone,
    generate_data_worker,
    messages_of,
    read_told,
    to_json,
)
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.errors import SpeculatorError, first_line

MAX_RETRIES = 3
"""Maximum number of times that Ray restarts a worker."""


def run_on_ray(plan: GenerationPlan) -> Iterator[Told]:
    """Messages of ``run.workers`` workers, until all are done.

    Raises:
        SpeculatorError: Ray is not installed or cannot be reached, or a worker failed.
    """
    try:
        import ray  # optional
    except ImportError as error:
        raise SpeculatorError(
            "run.backend is ray, but Ray is not installed here. Install speculators-vllm[ray], or "
            "set run.backend to local."
        ) from error
    try:
        is_ours = not ray.is_initialized()
        if is_ours:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SpeculatorError(
            f"run.backend is ray, but no Ray cluster can be reached: {first_line(error)}. Start "
            "one with `ray start`, or set run.backend to local."
        ) from error
    running: list[Any] = []
    try:
        work = ray.remote(
            num_cpus=1,
            num_gpus=_num_gpus(plan, ray),
            max_retries=MAX_RETRIES,
            num_returns="streaming",
        )(_work)
        plan_text = to_json(_absolute(plan))
        running += [work.remote(plan_text, worker) for worker in range(plan.run.workers)]
        yield from _listen(running, ray)
    finally:
        for generator in running:
            ray.cancel(generator, force=True)
        if is_ours:
            ray.shutdown()


def _work(plan: str, worker: int) -> Iterator[bytes]:
    parsed = GenerationPlan.model_validate_json(plan)
    yield from messages_of(lambda: generate_data_worker(parsed, worker))


def _listen(running: list[Any], ray: Any) -> Iterator[Told]:
    while running:
        (ready, *_), _ = ray.wait(running, num_returns=1, fetch_local=False)
        try:
            told = read_told(ray.get(next(ready)))
        except StopIteration:  # cancelled from outside
            raise SpeculatorError(
                "Ray cancelled a worker before it finished. What the workers stored is kept; pass "
                "--run.resume to resume."
            ) from None
        except ray.exceptions.RayError as error:
            raise SpeculatorError(
                f"A worker on Ray was lost: {first_line(error)} What the workers stored is kept; "
                "pass --run.resume to resume."
            ) from error
        if isinstance(told, WorkerDone):
            running.remove(ready)
        yield told


def _num_gpus(plan: GenerationPlan, ray: Any) -> int:
    """GPUs per worker: the engine's tensor-parallel size, or none on CPUs.

    Raises:
        SpeculatorError: the plan names a GPU by number, which Ray chooses.
    """
    device, over = plan.engine.device, plan.engine.vllm.get("tensor_parallel_size", 1)
    if device is not None and ":" in device:
        raise SpeculatorError(
            f"engine.device is {device}; expected cuda or cpu with run.backend ray, since Ray "
            "chooses each worker's GPU. Remove the number."
        )
    wants = device in (None, "cuda") and ray.cluster_resources().get("GPU", 0) > 0
    return int(over) if wants and isinstance(over, int) else 0


def _absolute(plan: GenerationPlan) -> GenerationPlan:
    """The plan with absolute local paths: a cluster's workers run in another directory."""
    data = plan.data.model_copy(
        update={
            "verifier": _in_full(plan.data.verifier),
            "chat_template": plan.data.chat_template and _in_full(plan.data.chat_template),
            "datasets": tuple(
                dataset.model_copy(update={"path": _in_full(dataset.path)})
                for dataset in plan.data.datasets
            ),
        }
    )
    key_file = plan.sync.key_file
    sync = plan.sync.model_copy(update={"key_file": key_file and key_file.expanduser().absolute()})
    return plan.model_copy(update={"data": data, "sync": sync})


def _in_full(name: str) -> str:
    try:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name
    except (OSError, RuntimeError):  # the text of a template is not a path
        return name
