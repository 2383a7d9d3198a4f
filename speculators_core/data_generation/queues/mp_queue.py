"""A queue between processes, through shared memory.

Tensors are passed in shared memory, messages as in `ZmqStore`. Training opens a source; the
processes that generate need only its ``url``:

    source = MPQueueStore.source(schema, sync, num_producers=2)
    there = sync.model_copy(update={"urls": (source.url,)})
    context.Process(target=generate, args=(schema, there))  # MPQueueStore.sink(schema, there)

Memory use follows the unacknowledged examples, at most `sync.queue_size` of any size. Several
sources, one per rank, have one URL each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from jaxtyping import Shaped
from torch import Tensor

from speculators_core.data_generation.examples import GeneratedExample, Schema
from speculators_core.data_generation.queues.ends import (
    TIMEOUT_S,
    QueueSink,
    QueueSource,
    unique_name,
)
from speculators_core.data_generation.queues.frames import FrameError, Hello, Label
from speculators_core.data_generation.queues.receiver import Receiver
from speculators_core.data_generation.queues.sender import QueuedExample, Sender
from speculators_core.data_generation.queues.shared_memory import (
    FilePool,
    FileReader,
    PrivateFolder,
    is_private,
    places,
    sweep,
)
from speculators_core.data_generation.queues.zmq_store import bind, connect
from speculators_core.data_generation.settings import SyncConfig
from speculators_core.errors import SpeculatorError


class MPQueueStore:
    """Both ends of a queue between processes of one user on one machine.

    Only this user can open it, so keys and compression are not used.
    """

    @staticmethod
    def sink(
        schema: Schema, sync: SyncConfig, name: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> QueueSink:
        """Sends to the sources with the URLs ``sync.urls``.

        Raises:
            SpeculatorError: there is no source.
        """
        if not sync.urls:
            raise SpeculatorError(
                "sync.urls is missing, which mp_queue requires: the URL of each source. "
                "Start training first, and set sync.urls to the URLs that it reports."
            )
        for url in sync.urls:
            if not is_private(Path(url.removeprefix("ipc://")).parent):
                raise SpeculatorError(
                    f"sync.urls: {url} is not an open queue; expected the URL of a source that "
                    "this user opened on this machine. Start training first, and copy the URL "
                    "that it reports."
                )
        hello = Hello(name=name or unique_name(), store="mp_queue", holds=schema)
        sender = Sender(sync.urls, hello, sync, timeout_s, connect)
        pool = FilePool(schema)
        clean_up = partial(_clean_up, pool.remove)
        return QueueSink(schema, sync.max_message_bytes, sender, partial(_load, pool), clean_up)

    @staticmethod
    def source(
        schema: Schema, sync: SyncConfig, num_producers: int = 1, timeout_s: float = TIMEOUT_S
    ) -> QueueSource:
        """Receives at a new URL, ``url`` of the result."""
        sweep()
        folder = PrivateFolder(places()[0])
        hello = Hello(name="consumer", store="mp_queue", holds=schema)
        plain = sync.model_copy(update={"key_file": None, "server_key": None})
        open_socket = partial(bind, url=f"ipc://{folder.path / 'socket'}", sync=plain)
        files = FileReader(schema, 2 * max(sync.queue_size, num_producers))
        unload = partial(_unload, files, sync.max_message_bytes)
        receiver = Receiver(hello, plain, num_producers, timeout_s, open_socket, unload)
        return QueueSource(schema, receiver, partial(_clean_up, folder.remove))


def _clean_up(remove: Callable[[], None]) -> None:
    """Removes this queue's files, and those that killed processes left."""
    remove()
    sweep()


def _load(
    pool: FilePool, label: Label, tensors: dict[str, Shaped[Tensor, "seq ..."]]
) -> QueuedExample:
    file, place = pool.write(tensors)
    told = label.model_copy(update={"file": place})
    return QueuedExample(told, (), release=partial(pool.give_back, file))


def _unload(
    files: FileReader, max_bytes: int, label: Label, payload: Sequence[memoryview]
) -> Callable[[], GeneratedExample | None]:
    size_bytes = label.num_tokens * files.schema.token_bytes
    if label.file is None or payload or size_bytes > max_bytes:
        raise FrameError(
            f"{size_bytes} bytes in {len(payload)} tensors, expected at most {max_bytes} bytes in "
            "shared memory"
        )
    memory, ticket = files.open(label.file, label.num_tokens), label.file.ticket

    def load() -> GeneratedExample | None:
        try:
            tensors = files.read(memory, ticket, label.num_tokens)
        except FrameError as error:
            raise SpeculatorError(
                f"example {label.key!r} in shared memory is damaged: {error}; expected the bytes "
                "that its producer wrote. Start generate-data again with --run.resume."
            ) from error
        if tensors is None:
            return None
        return files.schema.decode(label.key, label.num_prompt_tokens, tensors, repr(label.key))

    return load
