"""Processes that begin where everything is imported, and no thread runs yet."""

import multiprocessing

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "tests.data_generation.queues.queue_processes",
        "tests.data_generation.running",
        "tests.training.running",
    ]
)
