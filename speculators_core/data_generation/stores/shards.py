"""Shards: safetensors files of examples, listed in the header.

    input_ids      [tokens]                 | example 0 | example 1 | ... |
    hidden_states  [tokens, states, hidden] | example 0 | example 1 | ... |

Examples are concatenated along their first axis. The header also holds a checksum of each example,
and the examples that were set aside. The file is written field by field, straight from the
examples' tensors: safetensors' writer needs whole fields and copies them twice.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import pyarrow as pa
import torch
from jaxtyping import Shaped
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor
from xxhash import xxh3_64

from speculators_core.data_generation.examples import Failure, GeneratedExample, Schema
from speculators_core.errors import SpeculatorError, first_fault, first_line
from speculators_core.files import replaced
from speculators_core.settings import Settings

FORMAT = "speculators-data-1"
MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself."""
SUFFIXES = {"none": ".safetensors", "zstd": ".safetensors.zst"}
DTYPES = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""Data types by their names in safetensors."""


class Entry(Settings):
    """The place of an example in its shard."""

    key: str
    start: int = Field(ge=0)
    num_tokens: int = Field(ge=1)
    num_prompt_tokens: int = Field(ge=1)
    num_trained: int = Field(ge=0)
    """Number of tokens that a draft learns."""
    checksum: str = ""
    """64-bit XXH3 of the fields above and the bytes of all tensors in the schema's order."""

    def checksum_with(self, tensors: Mapping[str, Tensor]) -> str:
        digest = xxh3_64(self.model_dump_json(exclude={"checksum"}).encode())
        for tensor in tensors.values():
            digest.update(as_bytes(tensor))
        return digest.hexdigest()


class ShardHeader(Settings):
    """Contents of a shard."""

    format: Literal["speculators-data-1"]
    number: int = Field(ge=0)
    fields_digest: str
    """Hash of the schema; shards of other schemas do not belong to the store."""
    unit_digest: str = ""
    """Hash of the texts that the shard was made from."""
    entries: tuple[Entry, ...]
    set_aside: tuple[Failure, ...] = ()

    @model_validator(mode="after")
    def _lies_end_to_end(self) -> Self:
        end = 0
        for entry in self.entries:
            if entry.start != end or entry.num_prompt_tokens > entry.num_tokens:
                raise ValueError(
                    f"example {entry.key!r} starts at {entry.start} with {entry.num_prompt_tokens} "
                    f"prompt tokens of {entry.num_tokens}, expected start {end}"
                )
            end += entry.num_tokens
        return self

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)


def number_of(path: Path) -> int:
    """A shard's number, from its file name."""
    return int(path.name.split(".")[0])


def digest_of(schema: Schema) -> str:
    """Hash of a schema without the verifier's name, which changes when its folder moves."""
    return xxh3_64(schema.model_dump_json(exclude={"verifier"}).encode()).hexdigest()


def as_bytes(tensor: Shaped[Tensor, "..."]) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# ---- writing ----


def write_shard(
    path: Path,
    number: int,
    schema: Schema,
    results: Sequence[GeneratedExample | Failure],
    unit_digest: str = "",
) -> ShardHeader:
    """Writes a shard, compressed for ``.zst``; it gets its name once all of it is written.

    Raises:
        SpeculatorError: it cannot be written; no partial file remains.
    """
    made = [result for result in results if isinstance(result, GeneratedExample)]
    encoded = [schema.encode(example) for example in made]
    entries, start = [], 0
    for example, tensors in zip(made, encoded, strict=True):
        entry = Entry(
            key=example.key,
            start=start,
            num_tokens=len(example.input_ids),
            num_prompt_tokens=example.num_prompt_tokens,
            num_trained=int(example.loss_mask.sum()),
        )
        entries.append(entry.model_copy(update={"checksum": entry.checksum_with(tensors)}))
        start += len(example.input_ids)
    header = ShardHeader(
        format=FORMAT,
        number=number,
        fields_digest=digest_of(schema),
        unit_digest=unit_digest,
        entries=tuple(entries),
        set_aside=tuple(result for result in results if isinstance(result, Failure)),
    )
    try:
        with (
            replaced(path, is_synced=False) as temporary,
            _opened(temporary, path.suffix == ".zst") as file,
        ):
            _write(file, header, schema, encoded)
    except OSError as error:
        raise SpeculatorError(
            f"{path} could not be written: {error.strerror or first_line(error)}; expected a "
            "writable folder with room. Make room, then pass --run.resume to resume; existing "
            "shards are kept."
        ) from error
    return header


def _opened(path: Path, is_compressed: bool) -> Any:
    return pa.CompressedOutputStream(str(path), "zstd") if is_compressed else path.open("wb")


def _write(
    file: BinaryIO, header: ShardHeader, schema: Schema, encoded: Sequence[Mapping[str, Tensor]]
) -> None:
    """Writes the safetensors format: length and text of a JSON header, then the tensors.

    Fields of wide types come first, so that each is aligned to its type.
    """
    described: dict[str, Any] = {"__metadata__": {"shard": header.model_dump_json()}}
    names = sorted(schema.fields, key=lambda name: -schema.fields[name].dtype.itemsize)
    start = 0
    for name in names:
        spec = schema.fields[name]
        shape = (header.num_tokens, *spec.tail)
        end = start + spec.dtype.itemsize * torch.Size(shape).numel()
        described[name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": shape,
            "data_offsets": (start, end),
        }
        start = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for name in names:
        for tensors in encoded:
            file.write(as_bytes(tensors[name]))


# ---- reading ----


def read_header(path: Path) -> ShardHeader:
    """Reads a shard's header.

    Raises:
        SpeculatorError: the file is truncated, or is not a shard.
    """
    try:
        if path.suffix == ".zst":
            return _header_in(_metadata_of_compressed(path), path)
        with safe_open(path, "pt") as file:
            return _header_in(file.metadata(), path)
    except SpeculatorError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError, struct.error) as error:
        raise damaged(path, first_line(error)) from error


def _metadata_of_compressed(path: Path) -> Any:
    with pa.input_stream(str(path), compression="zstd") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, at most {MAX_HEADER_BYTES} allowed")
        described = json.loads(file.read(length))
    return described.get("__metadata__") if isinstance(described, dict) else None


def _header_in(metadata: Any, path: Path) -> ShardHeader:
    if not isinstance(metadata, dict) or "shard" not in metadata:
        raise damaged(path, "its header lists no examples")
    try:
        return ShardHeader.model_validate_json(metadata["shard"])
    except ValidationError as error:
        raise damaged(path, first_fault(error)) from error


def damaged(path: Path, what: str) -> SpeculatorError:
    return SpeculatorError(
        f"{path} is damaged: {what}; expected the bytes that generate-data wrote. Pass "
        "--run.repair to generate it again, or copy it again."
    )


class Shard:
    """An open shard; the tensors of an uncompressed one are views of the memory-mapped file."""

    def __init__(self, path: Path, schema: Schema, verified: bytearray | None = None) -> None:
        """``verified``: flags of examples whose checksums need not be compared again.

        Raises:
            SpeculatorError: it is truncated, or has another schema.
        """
        self.path = path
        self.schema = schema
        self.header = read_header(path)
        if self.header.fields_digest != digest_of(schema):
            raise damaged(path, "its schema is not the store's")
        if self.header.number != number_of(path):
            raise damaged(path, f"its header states shard {self.header.number}")
        self.verified = verified or bytearray(len(self))

    @cached_property
    def tensors(self) -> dict[str, Shaped[Tensor, "tokens ..."]]:
        try:
            if self.path.suffix == ".zst":
                tensors = load(self._decompressed())
            else:
                with safe_open(self.path, "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise damaged(self.path, first_line(error)) from error
        if tensors.keys() != self.schema.fields.keys() or any(
            len(tensor) != self.header.num_tokens for tensor in tensors.values()
        ):
            raise damaged(self.path, "its tensors do not match its header")
        return {name: tensors[name] for name in self.schema.fields}

    def _decompressed(self) -> bytes:
        """The decompressed file; one that does not have the size in its header is damaged."""
        data_bytes = self.header.num_tokens * self.schema.token_bytes
        with pa.input_stream(str(self.path), compression="zstd") as file:
            (length,) = struct.unpack("<Q", start := file.read(8))
            rest = file.read(length + data_bytes + 1)
        if len(rest) != length + data_bytes:
            raise damaged(self.path, f"it does not hold the {data_bytes} bytes its header states")
        return start + rest

    def __len__(self) -> int:
        return len(self.header.entries)

    def read(self, index: int) -> GeneratedExample:
        """An example; its checksum is compared the first time.

        Raises:
            SpeculatorError: the bytes are not those that were written.
        """
        entry = self.header.entries[index]
        own = {
            name: tensor[entry.start : entry.start + entry.num_tokens]
            for name, tensor in self.tensors.items()
        }
        if not self.verified[index]:
            if entry.checksum_with(own) != entry.checksum:
                raise damaged(self.path, f"the checksum of example {entry.key!r} does not match")
            self.verified[index] = True
        if self.path.suffix == ".zst":  # a view would keep the whole shard in memory
            own = {name: tensor.clone() for name, tensor in own.items()}
        return self.schema.decode(entry.key, entry.num_prompt_tokens, own, str(self.path))

    def __iter__(self) -> Iterator[GeneratedExample]:
        return (self.read(index) for index in range(len(self)))
