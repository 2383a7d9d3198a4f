"""Units of work, identical in every run."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from xxhash import xxh3_64

from speculators_core.data_generation.examples import Example
from speculators_core.data_generation.settings import GenerationPlan

Item = TypeVar("Item")


@dataclass(frozen=True)
class Unit:
    """Consecutive examples that become one shard."""

    number: int
    examples: tuple[Example, ...]

    @property
    def digest(self) -> str:
        """Hash of the unit's texts, which reveals that the data have changed."""
        digest = xxh3_64()
        for example in self.examples:
            digest.update(f"{example.key} {len(example.input_ids)}".encode())
            digest.update(example.input_ids.numpy().data)
            digest.update(example.loss_mask.numpy().data)
        return digest.hexdigest()


def cut_units(examples: Iterable[Example], plan: GenerationPlan) -> Iterator[Unit]:
    """Examples in units of at most ``sync.shard_tokens`` tokens, including those to be generated.

    A unit depends only on the examples before it, so every worker and every run cuts alike.
    """
    written = plan.engine.max_new_tokens if plan.data.states.tokens == "all" else 0
    unit: list[Example] = []
    number, num_tokens = 0, 0
    for example in islice(examples, plan.run.limit):
        length = len(example.input_ids) + written
        if unit and num_tokens + length > plan.sync.shard_tokens:
            yield Unit(number, tuple(unit))
            number, unit, num_tokens = number + 1, [], 0
        unit.append(example)
        num_tokens += length
    if unit:
        yield Unit(number, tuple(unit))


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; a thread prepares the next one while the caller uses the current one."""
    end = object()
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        upcoming = thread.submit(next, iterator, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]  # what `next` gives but `end`
