"""Examples between processes of one machine: their bytes in shared memory, the rest as `ZmqStore`.

Training opens a source; its ``url`` says all to the processes that generate:

    source = MPQueueStore.source(schema, sync, num_producers=2)
    there = sync.model_copy(update={"urls": (source.url,)})
    context.Process(target=generate, args=(schema, there))  # MPQueueStore.sink(schema, there)

Memory follows what is under way, `sync.queue_size` examples; one of any size finds room while the
machine has some. Several sources, one for each rank, are several URLs.
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
from speculators_core.data_generation.queues.sender import Parcel, Sender
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

    Only this user can open them, so keys are not used, nor is compression.
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
            raise SpeculatorError("sync.urls is missing: the URL of each source.")
        for url in sync.urls:
            if not is_private(Path(url.removeprefix("ipc://")).parent):
                raise SpeculatorError(f"{url} is no source of this user. Open the source first.")
        hello = Hello(name=name or unique_name(), store="mp_queue", holds=schema)
        sender = Sender(sync.urls, hello, sync, timeout_s, connect)
        pool = FilePool(schema)
        clean_up = partial(_clean_up, pool.remove)
        return QueueSink(schema, sync.max_message_bytes, sender, partial(_load, pool), clean_up)

    @staticmethod
    def source(
        schema: Schema, sync: SyncConfig, num_producers: int = 1, timeout_s: float = TIMEOUT_S
    ) -> QueueSource:
        """Receives at a URL of its own."""
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
    """Ours, and what others left that were killed."""
    remove()
    sweep()


def _load(pool: FilePool, label: Label, tensors: dict[str, Shaped[Tensor, "seq ..."]]) -> Parcel:
    file, place = pool.write(tensors)
    told = label.model_copy(update={"file": place})
    return Parcel(told, (), release=partial(pool.give_back, file))


def _unload(
    files: FileReader, max_bytes: int, label: Label, payload: Sequence[memoryview]
) -> Callable[[], GeneratedExample | None]:
    size_bytes = label.num_tokens * files.schema.token_bytes
    if label.file is None or payload or size_bytes > max_bytes:
        raise FrameError(f"an example of {size_bytes} bytes in {len(payload)} tensors")
    memory, ticket = files.open(label.file, label.num_tokens), label.file.ticket

    def load() -> GeneratedExample | None:
        try:
            tensors = files.read(memory, ticket, label.num_tokens)
        except FrameError as error:
            raise SpeculatorError(f"example {label.key!r} is damaged: {error}.") from error
        if tensors is None:
            return None
        return files.schema.decode(label.key, label.num_prompt_tokens, tensors, repr(label.key))

    return load
