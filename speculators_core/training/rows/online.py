"""Examples that are generated while training runs."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from speculators_core.data_generation.engines.pipeline import schema_of
from speculators_core.data_generation.engines.transformers import TransformersPipeline
from speculators_core.data_generation.examples import Failure, GeneratedExample
from speculators_core.data_generation.queues.ends import QueueSource
from speculators_core.data_generation.queues.mp_queue import MPQueueStore
from speculators_core.data_generation.queues.zmq_store import ZmqStore
from speculators_core.data_generation.runs.generate import GenerationProcess, generate_data_process
from speculators_core.data_generation.runs.preparation import placed
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.data_generation.texts.sources import Counts, read_plan_examples
from speculators_core.errors import SpeculatorError
from speculators_core.settings import read_sections


def read_generation_plan(file: Path, is_elsewhere: bool = False) -> GenerationPlan:
    """The plan of a `speculators generate-data` configuration.

    Its options for a store or queue are used only where it runs elsewhere.

    Raises:
        SpeculatorError: the file cannot be read, or an option in it is unknown or out of bounds.
    """
    sections = read_sections(file, GenerationPlan, {})
    if not is_elsewhere:
        here = {"kind": "mp_queue", "urls": ["ipc://here"], "path": None, "compression": "none"}
        sections["sync"] = {**(sections.get("sync") or {}), **here}
    return placed(GenerationPlan.read(sections, str(file)), file.resolve().parent)


class Generation:
    """Generation in a separate process, started for each pass, which sends its examples here.

    Each pass has all examples of the plan; with several workers in the order of their completion.
    """

    is_stream: Literal[True] = True
    is_held = False

    def __init__(self, plan: GenerationPlan, queue_size: int) -> None:
        self.plan = plan
        self.while_waiting: Callable[[], None] = lambda: None
        self.schema = schema_of(plan)
        self._queue_size = queue_size
        self._process: GenerationProcess | None = None

    def open(self, number: int) -> None:
        self.close()
        plan = self.plan
        sync = plan.sync.model_copy(update={"queue_size": self._queue_size})
        source = self._source = MPQueueStore.source(self.schema, sync, plan.run.workers)
        source.while_waiting = self.while_waiting
        there = sync.model_copy(update={"urls": (source.url,)})
        process = self._process = generate_data_process(plan.model_copy(update={"sync": there}))
        self._fault: SpeculatorError | None = None
        self._watcher = threading.Thread(target=self._watch, args=(process, source), daemon=True)
        self._watcher.start()

    def hold(self) -> Iterator[GeneratedExample]:
        """Raises SpeculatorError where the generation failed, or was killed."""
        try:
            yield from self._source.read()
        except SpeculatorError as error:
            self.while_waiting()  # a signal that ends both processes is not a fault
            raise self._fault or error from error
        self._watcher.join()
        if self._fault is not None:
            self.while_waiting()
            raise self._fault

    def done(self, keys: Iterable[str]) -> None:
        self._source.done(keys)

    def _watch(self, process: GenerationProcess, source: QueueSource) -> None:
        """Waits for the process to end; a fault of it closes the queue, so that nobody waits."""
        try:
            process.report()
        except SpeculatorError as error:
            self._fault = error
            source.close()

    def close(self) -> None:
        """Stops the process and frees the memory of the queue."""
        if self._process is not None:
            self._process.stop()
            self._watcher.join()
            if self._fault is None:  # a fault has closed it already
                self._source.close()
            self._process = None


class Received:
    """Examples of generation elsewhere, which are sent to this process's URL of the plan."""

    is_stream: Literal[True] = True
    is_held = True

    def __init__(self, plan: GenerationPlan, queue_size: int, rank: int, world_size: int) -> None:
        """Raises:
        SpeculatorError: the plan does not have one URL for each process of the training.
        """
        urls = plan.sync.urls
        if plan.sync.kind != "zmq" or len(urls) != world_size:
            raise SpeculatorError(
                f"data.queue: sync.kind is {plan.sync.kind} with {len(urls)} sync.urls; expected "
                f"zmq with {world_size}, one for each process of the training. Change them in the "
                "configuration."
            )
        self.schema = schema_of(plan)
        self._sync = plan.sync.model_copy(update={"queue_size": queue_size})
        self._workers = plan.run.workers
        self._url = f"tcp://*:{urls[rank].rpartition(':')[2]}"
        self.while_waiting: Callable[[], None] = lambda: None
        self._source: QueueSource | None = None

    def open(self, number: int) -> None:
        """Raises:
        SpeculatorError: it is not the first pass, or the URL is in use.
        """
        if number:
            raise SpeculatorError(
                "data.queue ended before run.max_steps. Generate more examples, or lower "
                "run.max_steps."
            )
        self._source = ZmqStore.source(self.schema, self._sync, self._url, self._workers)
        self._source.while_waiting = self.while_waiting

    def hold(self) -> Iterator[GeneratedExample]:
        """Raises SpeculatorError where nothing is sent."""
        assert self._source is not None
        yield from self._source.hold()

    def done(self, keys: Iterable[str]) -> None:
        assert self._source is not None
        self._source.done(keys)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()


class TextExamples:
    """Texts by number; the verifier, on Transformers, runs over a text when it is read."""

    is_stream: Literal[False] = False

    def __init__(self, plan: GenerationPlan) -> None:
        """Reads all texts, and loads the verifier.

        Raises:
            SpeculatorError: texts or verifier cannot be read, or no text can be used.
        """
        if plan.data.states.tokens == "all":
            raise SpeculatorError(
                "data.texts: data.states.tokens is all, which needs answers of the verifier; "
                "expected prompt. Set it so, or write answers first with `speculators regenerate`."
            )
        self.schema = schema_of(plan)
        self.name = ", ".join(source.path for source in plan.data.datasets)
        self._examples = list(islice(read_plan_examples(plan, Counts()), plan.run.limit))
        if not self._examples:
            raise SpeculatorError(
                f"{self.name}: no text can be used; at least one must have tokens to learn. See "
                "data.min_trained_tokens."
            )
        self._pipeline = TransformersPipeline(plan, self.schema)

    @property
    def verifier(self) -> PreTrainedModel:
        return self._pipeline.model

    @property
    def lengths(self) -> Int64[np.ndarray, "examples"]:
        return np.array([len(example.input_ids) for example in self._examples])

    @property
    def num_trained(self) -> Int64[np.ndarray, "examples"]:
        return np.array([int(example.loss_mask.sum()) for example in self._examples])

    def key(self, number: int) -> str:
        return self._examples[number].key

    def read(self, numbers: Sequence[int]) -> list[GeneratedExample]:
        made = self._pipeline.run([self._examples[number] for number in numbers])
        for result in made:
            if isinstance(result, Failure):
                raise SpeculatorError(
                    f"{self.name}: example {result.key!r} cannot be run: {result.reason}. Remove "
                    "it from the texts."
                )
        return [result for result in made if isinstance(result, GeneratedExample)]

    def count_tokens(self, numbers: Sequence[int]) -> Int64[Tensor, "vocab"]:
        counts = torch.zeros(self.schema.vocab_size, dtype=torch.int64)
        for number in numbers:
            example = self._examples[number]
            counts += example.input_ids[example.loss_mask].bincount(minlength=len(counts))
        return counts
